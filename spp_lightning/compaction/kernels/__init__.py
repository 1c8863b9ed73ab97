"""What computes a layer: C++ kernels on CPUs, Triton kernels on GPUs."""
