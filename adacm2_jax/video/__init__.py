"""Video files: which frame is shown at an instant, decoded (PyAV) and made square.

Numpy, PIL and PyAV alone: nothing here knows JAX, and PyAV is imported where a file is opened, so
that the library can be imported without it.
"""
