"""The defaults around a model, as fields that can be overridden; the experiments beside this file
change a few.

Every field, its default and what it means: adacm2_jax/runs/experiment.py and docs/configuration.md.
A field is overridden on the command line as ``--config.train.steps=100``; one that does not exist
is an error.
"""

import ml_collections

from adacm2_jax.config import AdaCM2Config
from adacm2_jax.runs.experiment import Experiment, to_dict


def base_config(model: AdaCM2Config) -> ml_collections.ConfigDict:
    """The defaults around a model."""
    return ml_collections.ConfigDict(to_dict(Experiment(model), plain=False))
