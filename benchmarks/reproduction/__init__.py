"""The parts of ``appendix.py`` and ``report.py``: rows, methods, runs, lines, tables and charts."""
