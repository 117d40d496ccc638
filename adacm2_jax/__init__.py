"""AdaCM² in JAX: long-video understanding with a visual memory of constant size.

The idea is in ``memory.py`` and ``policies.py``, the networks in ``models/``, and
``models/adacm2.py`` joins them. Importing the library needs jax, flax and numpy alone.
"""

__version__ = "0.1.0"
