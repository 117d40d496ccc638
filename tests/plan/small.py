"""The plan of a small model with a frozen ViT and LLM: clips of eight frames, in chunks of four."""

import ml_collections

from adacm2_jax.config import MemoryConfig, tiny
from adacm2_jax.plan.steps import Plan, make_plan
from adacm2_jax.runs.experiment import read
from configs.base import base_config

POLICIES = {
    "eq8": MemoryConfig(),
    "full": MemoryConfig(policy="full", max_frames=8),
    "merge": MemoryConfig(policy="merge", bank_frames=3),
}


def small_config(policy: str = "eq8", **fields) -> ml_collections.ConfigDict:
    """The experiment; ``train__steps=2`` sets ``train.steps``."""
    config = base_config(tiny(memory=POLICIES[policy]))
    config.train.num_frames, config.train.chunk, config.eval.chunk = 8, 4, 4
    config.train.batch_size = config.eval.batch_size = 4
    for path, value in fields.items():
        section, field = path.split("__")
        config[section][field] = value
    return config


def small_plan(step: str, policy: str = "eq8", **fields) -> Plan:
    return make_plan(read(small_config(policy, **fields)), step)
