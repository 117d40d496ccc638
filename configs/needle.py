"""The needle task with the tiny model, in three stages of longer and longer clips.

COMMAND: python train.py --config configs/needle.py:first --workdir runs/needle/first
         python train.py --config configs/needle.py:second --workdir runs/needle/second
         python train.py --config configs/needle.py --workdir runs/needle/main
Expected: `make quickstart` runs the three and reports what they reach.

``first`` reads only the frame that answers and starts from nothing: the ViT learns digits.
``second`` sees clips of four frames and learns to look for the colour that is asked for. The main
experiment sharpens this on clips of sixteen. Every token is kept in training; how many are kept
later, and which, is chosen at evaluation.
"""

import ml_collections

from adacm2_jax.config import MemoryConfig, tiny
from configs.base import base_config

#: Stage → the one that it starts from, frames of a clip, clips, batch size, steps, learning rate.
STAGES = {
    "first": ("", 1, 12000, 64, 700, 1e-3),
    "second": ("first", 4, 12000, 32, 1200, 7e-4),
    "main": ("second", 16, 2000, 16, 300, 4e-4),
}


def get_config(stage: str = "main") -> ml_collections.ConfigDict:
    start, frames, clips, batch_size, steps, learning_rate = STAGES[stage]
    memory = MemoryConfig(
        policy="full", max_frames=frames, recent_ratio="0.05", conserve_ratio="0.4"
    )
    # Short texts: every text is padded to the limit, and the task needs ten tokens.
    model = tiny(memory=memory, remat=False, max_text_len=12, max_answer_len=4)
    config = base_config(model)
    config.init_from = f"runs/needle/{start}" if start else ""
    config.data.source = "needle"
    config.data.needle.num_frames = max(frames, 4)
    config.data.needle.train_size = clips
    config.data.needle.test_size = 200
    config.data.needle.evidence_only = frames == 1
    config.data.sampling.num_frames = frames
    config.data.cache = True
    config.train.num_frames = frames
    config.train.gradient = "scan"  # the ViT learns
    config.train.batch_size = batch_size
    config.train.steps = steps
    config.optim.learning_rate = learning_rate
    # The order of the frames says nothing here, and rows of later frames would stay untrained.
    config.optim.groups = (("temporal_embed", None), (".*", 1.0))
    config.eval.batch_size = 50
    config.eval.policies = ("adacm2",)
    config.generation.max_new_tokens = 4
    return config
