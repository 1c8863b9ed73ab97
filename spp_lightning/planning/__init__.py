"""Targets of the whole network, solved into a ratio per layer."""
