// What lets one header serve the host compiler, several instruction sets of it, and nvcc.
#pragma once

#if defined(__CUDACC__)
#define CK_HD __host__ __device__ __forceinline__
#else
#define CK_HD inline __attribute__((always_inline))
#endif

// Every instruction set gets a namespace of its own, so that the linker can never merge a function
// compiled for AVX-512 with its baseline twin.
#if !defined(CK_ISA)
#define CK_ISA portable
#define CK_PORTABLE 1
#endif
