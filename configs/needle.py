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
    first = stage == "first"
    frames = 1 if first else 4
    memory = MemoryConfig(
        policy="full", max_frames=frames, recent_ratio="0.1", conserve_ratio="0.7"
    )
    # Short texts: every text is padded to the limit, and the task needs ten tokens.
    model = tiny(memory=memory, remat=False, max_text_len=12, max_answer_len=4)
    config = base_config(model)
    config.init_from = "" if first else "runs/needle/first"
    config.data.source = "needle"
    config.data.needle.num_frames = 4
    config.data.needle.train_size = 12000
    config.data.needle.test_size = 200
    config.data.needle.evidence_only = first
    config.data.sampling.num_frames = frames
    config.data.cache = True
    config.train.num_frames = frames
    config.train.batch_size = 64 if first else 32
    config.train.steps = 700 if first else 1500
    config.optim.learning_rate = 1e-3 if first else 7e-4
    # The order of the frames says nothing here, and rows of later frames would stay untrained.
    config.optim.groups = (("temporal_embed", None), (".*", 1.0))
    config.eval.batch_size = 50
    config.eval.policies = ("full",) if first else ("adacm2",)
    config.generation.max_new_tokens = 4
    return config
