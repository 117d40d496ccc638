"""The suite of generated tasks with the tiny model, in two stages of longer and longer clips.

COMMAND: python benchmarks/suite.py --workdir runs/suite --vision_only
         python train.py --config configs/suite.py:first --workdir runs/suite/0/first
         python train.py --config configs/suite.py --workdir runs/suite/0/main
Expected: `make suite` runs the three for three seeds and says what they reach.

As in ``configs/needle.py``, a ViT is made first and frozen. Both stages are a mixture of tasks:
which digit was on a ground (``needle``), on which of two it came first (``order``, the hardest, so
twice), and what it was before or after it changed (``change``). The temporal embedding starts from
zeros; with ten times the learning rate of the rest it is learned sooner (the same in the end).
The clips are drawn when they are read; the videos of ``val``, on which the numbers here were chosen
(``benchmarks/suite_search.py``), and of ``test`` are real H.264 files. In another directory than
runs/suite/0, say where a stage starts: --config.init_from=…/vision, …/first.
"""

import ml_collections

from adacm2_jax.config import MemoryConfig, tiny
from configs.base import base_config
from configs.needle import Stage, Vision

VISION = Vision(64, 1000, 3e-3)
STAGES = {
    "first": Stage("vision", 4, 32, 1200, 1e-3, 24),
    "main": Stage("first", 16, 16, 600, 7e-4, 24),
}
TASKS = ("needle", "order", "order", "change")
#: Of the learning rate, for the temporal embedding.
TEMPORAL_FACTOR = 10.0
#: As many rows as the shortest clips have frames: all rows learn from the first stage on, and the
#: frames of longer videos lie between them.
TEMPORAL_POSITIONS = 4


def get_config(stage: str = "main") -> ml_collections.ConfigDict:
    if stage not in STAGES:
        raise ValueError(f"configs/suite.py:{stage}: the stages are {', '.join(STAGES)}")
    start, frames, batch_size, steps, learning_rate, max_text_len = STAGES[stage]
    memory = MemoryConfig(
        policy="full", max_frames=frames, recent_ratio="0.05", conserve_ratio="0.4"
    )
    model = tiny(
        memory=memory,
        remat=False,
        max_text_len=max_text_len,
        max_answer_len=4,
        temporal_positions=TEMPORAL_POSITIONS,
    )
    config = base_config(model)
    config.init_from = f"runs/suite/0/{start}"
    if start == "vision":
        config.init_missing = ("(?!vision/).*",)
    config.data.source = "suite"
    config.data.suite.tasks = TASKS
    config.data.suite.num_frames = frames
    config.data.suite.train_size = batch_size * steps  # each is seen once
    config.data.suite.test_size = 100
    config.data.sampling.num_frames = frames
    config.train.num_frames = frames
    config.train.batch_size = batch_size
    config.train.steps = steps
    config.optim.learning_rate = learning_rate
    config.optim.groups = (
        ("vision/.*", None),
        ("temporal_embed", TEMPORAL_FACTOR),
        (".*", 1.0),
    )
    config.eval.batch_size = 48
    config.eval.policies = ("adacm2",)
    config.generation.max_new_tokens = 4
    return config
