"""Collected only where Apache Beam is installed: it needs older packages than all else does."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("apache_beam") else ["test_prepare_beam.py"]
