// Macros that let one header serve the host compiler, its instruction sets, and nvcc.
#pragma once

#if defined(__CUDACC__)
#define CK_HD __host__ __device__ __forceinline__
#else
#define CK_HD inline __attribute__((always_inline))
#endif

// Every instruction set has its own namespace, so that the linker cannot merge a function compiled
// for AVX-512 with its baseline version.
#if !defined(CK_ISA)
#define CK_ISA portable
#define CK_PORTABLE 1
#endif
