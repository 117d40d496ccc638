"""The visual memory: what is kept of a video from frame to frame, in buffers of constant size.

``slots.py`` is the method, ``policies.py`` its rivals of the same mechanism, ``banks.py`` MA-LMM's
memory, which merges instead of dropping.
"""
