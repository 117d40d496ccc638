"""Collected only where Apache Beam is installed: it needs older packages than all else does."""

import importlib.util

HAS_BEAM = importlib.util.find_spec("apache_beam") is not None
collect_ignore = [] if HAS_BEAM else ["test_prepare_beam.py", "test_build_beam.py"]
