"""The experiment of an existing run, for eval.py: ``--config configs/run.py:WORKDIR``.

COMMAND: python eval.py --workdir runs/quickstart   (which takes this file by itself)
"""

import ml_collections

from adacm2_jax.checkpoint import read_config


def get_config(workdir: str) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict(read_config(workdir), convert_dict=True)
    with config.unlocked():
        for path in ("mesh", "optim.groups", "eval.policies"):  # JSON has no tuples
            *parents, name = path.split(".")
            owner = config
            for parent in parents:
                owner = owner[parent]
            owner[name] = tuple(
                tuple(v) if isinstance(v, (list, tuple)) else v for v in owner[name]
            )
    return config.lock()
