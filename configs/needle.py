"""The needle task with the tiny model, in two stages of longer and longer clips.

COMMAND: python quickstart.py --workdir runs/needle --vision_only
         python train.py --config configs/needle.py:first --workdir runs/needle/first
         python train.py --config configs/needle.py --workdir runs/needle/main
Expected: `make quickstart` runs the three and reports what they reach.

As in the paper, the ViT is pretrained and frozen; there is none of this size, so the first command
makes one, which knows digits and colours. ``first`` sees clips of four frames: the Q-Former and the
language model start from nothing and learn to look for the colour that is asked for. The main
experiment sharpens this on clips of sixteen. Every token is kept in training; how many are kept
later, and which, is chosen at evaluation. The clips are drawn when they are read; the test videos
are real H.264 files. In another directory than runs/needle, say where a stage starts:
--config.init_from=…/vision, …/first.
"""

from typing import NamedTuple

import ml_collections

from adacm2_jax.config import MemoryConfig, tiny
from configs.base import base_config


class Stage(NamedTuple):
    """One stage of training.

    Attributes:
      start: what it starts from, beside it.
      frames: of a clip.
      batch_size: clips in a step.
      steps: how many.
      learning_rate: the highest.
      max_text_len: tokens of a question. Every text is padded to the limit, and the task's own
        questions need sixteen; the last stage, whose model is asked later, leaves room.
    """

    start: str
    frames: int
    batch_size: int
    steps: int
    learning_rate: float
    max_text_len: int


class Vision(NamedTuple):
    """How the ViT is made, see ``adacm2_jax/training/pretrain.py``."""

    batch_size: int
    steps: int
    learning_rate: float


VISION = Vision(64, 1000, 3e-3)
STAGES = {
    "first": Stage("vision", 4, 32, 400, 1e-3, 16),
    "main": Stage("first", 16, 16, 150, 5e-4, 32),
}


def get_config(stage: str = "main") -> ml_collections.ConfigDict:
    if stage not in STAGES:
        raise ValueError(f"configs/needle.py:{stage}: the stages are {', '.join(STAGES)}")
    start, frames, batch_size, steps, learning_rate, max_text_len = STAGES[stage]
    memory = MemoryConfig(
        policy="full", max_frames=frames, recent_ratio="0.05", conserve_ratio="0.4"
    )
    model = tiny(memory=memory, remat=False, max_text_len=max_text_len, max_answer_len=4)
    config = base_config(model)
    config.init_from = f"runs/needle/{start}"
    if start == "vision":
        config.init_missing = ("(?!vision/).*",)
    config.data.source = "needle"
    config.data.needle.num_frames = frames
    config.data.needle.train_size = batch_size * steps  # each is seen once
    config.data.needle.test_size = 200
    config.data.needle.drawn = True
    config.data.sampling.num_frames = frames
    config.train.num_frames = frames
    config.train.batch_size = batch_size
    config.train.steps = steps
    config.optim.learning_rate = learning_rate
    # The order of the frames says nothing here, and rows of later frames would stay untrained.
    config.optim.groups = (("vision/.*|temporal_embed", None), (".*", 1.0))
    config.eval.batch_size = 50
    config.eval.policies = ("adacm2",)
    config.generation.max_new_tokens = 4
    return config
