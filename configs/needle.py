"""The needle task with the tiny model: videos of a few frames, every token kept.

COMMAND: python train.py --config configs/needle.py:first --workdir runs/needle/first
         python train.py --config configs/needle.py --workdir runs/needle/main
Expected: `make quickstart` runs both and reports what they reach.

``first`` reads only the frame that answers (T = 1) and starts from nothing: the ViT learns digits.
The main experiment starts from it, sees whole videos and learns to look for the colour.
"""

import ml_collections

from adacm2_jax.config import MemoryConfig, tiny
from configs.base import base_config


def get_config(stage: str = "main") -> ml_collections.ConfigDict:
    frames = 1 if stage == "first" else 4
    config = base_config(tiny(memory=MemoryConfig(policy="full", max_frames=frames)))
    config.data.source = "needle"
    config.data.needle.num_frames = 4
    config.data.needle.evidence_only = stage == "first"
    config.data.sampling.num_frames = frames
    config.data.cache = True
    config.train.num_frames = frames
    config.train.batch_size = 64
    config.train.steps = 2000
    config.optim.learning_rate = 1e-3
    config.optim.groups = ((".*", 1.0),)
    config.eval.batch_size = 50
    config.eval.policies = ("full",)
    config.generation.max_new_tokens = 4
    if stage != "first":
        config.init_from = "runs/needle/first"
    return config
