"""Passes over a traced network, one per file."""
