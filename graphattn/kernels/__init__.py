"""Our Triton kernels."""
