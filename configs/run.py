"""The experiment of an existing run, for eval.py: ``--config configs/run.py:WORKDIR``.

COMMAND: python eval.py --workdir runs/quickstart/main   (which takes this file by itself)

A converted checkpoint has no experiment of its own: it is asked as LAVIS asks InstructBLIP.
"""

import ml_collections

from adacm2_jax.config import from_dict
from adacm2_jax.runs.checkpoint import is_base, read_config
from configs.base import base_config


def get_config(workdir: str) -> ml_collections.ConfigDict:
    stored = read_config(workdir)
    config = base_config(from_dict(stored["model"]))
    if not is_base(workdir):
        with config.ignore_type():
            config.update(_with_tuples(stored))  # over the fields that are younger than the run
        return config
    config.init_missing = ("temporal_embed",)
    config.data.prompt = "Question: {question} Short answer:"
    config.generation.num_beams = 5
    config.generation.repetition_penalty = 1.5
    config.generation.length_penalty = 0.0
    config.generation.max_new_tokens = 10
    return config


def _with_tuples(value):
    """Lists as tuples again, which JSON does not have and overrides need."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
