"""The CPU kernels: C++ sources, and the library built from them when the package is installed."""
