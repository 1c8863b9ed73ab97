"""Compact networks for runtimes outside of Python."""
