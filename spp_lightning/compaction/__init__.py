"""Pruned networks made fast: only the kept columns are stored and computed."""
