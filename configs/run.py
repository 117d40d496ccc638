"""The experiment of an existing run, for eval.py: ``--config configs/run.py:WORKDIR``.

COMMAND: python eval.py --workdir runs/quickstart   (which takes this file by itself)
"""

import ml_collections

from adacm2_jax.checkpoint import read_config


def get_config(workdir: str) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(_with_tuples(read_config(workdir)))


def _with_tuples(value):
    """Lists as tuples again, which JSON does not have and overrides need."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
