"""Networks that the examples and benchmarks train."""
