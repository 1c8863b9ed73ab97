"""The published method, in torch alone."""
