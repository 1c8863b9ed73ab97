"""The C++ kernels seen from Python."""
