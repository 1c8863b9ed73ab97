"""Random layers, networks and files, and what must hold of each."""
