"""The losses as Triton kernels, for any GPU that Triton compiles for."""
