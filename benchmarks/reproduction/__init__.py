"""What ``appendix.py`` and ``report.py`` are made of: rows, methods, runs, lines and pictures."""
