"""The benchmarks that people report; see ``task.py``."""
