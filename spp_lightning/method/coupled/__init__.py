"""Channels of several layers that are pruned as one weight group."""
