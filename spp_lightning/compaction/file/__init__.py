"""Compact networks as files."""
