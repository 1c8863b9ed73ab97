"""Structured Probabilistic Pruning, in torch alone."""
