"""The experiment of an existing run or converted checkpoint: ``--config configs/run.py:DIRECTORY``.

COMMAND: python eval.py --workdir runs/quickstart/main   (which takes this file by itself)
"""

import ml_collections

from adacm2_jax.runs.experiment import to_dict
from adacm2_jax.runs.load import experiment_of


def get_config(directory: str) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(to_dict(experiment_of(directory), plain=False))
