"""Your own videos: the tiny model, from nothing, on questions and answers in JSON lines.

COMMAND: python train.py --config configs/videos.py:train.jsonl,test.jsonl --workdir runs/videos
         adacm2 ask clip.mp4 --model runs/videos --question "what happens?"
Expected: half a minute of compiling, then about a step a second on two cores. The tiny model knows
nothing but what these files teach: with a few hundred clips and a few dozen different answers it
learns what tells those apart. For open questions take configs/instructblip_vicuna_7b.py.

A line of the files: {"video": "clips/a.mp4", "question": "…", "answer": "…"}, with "start" and
"end" in seconds where a part of the video counts; paths are relative to the file. Without a second
file the first one is evaluated, too.
"""

import ml_collections

from adacm2_jax.config import tiny
from configs.base import base_config


def get_config(files: str = "train.jsonl,test.jsonl") -> ml_collections.ConfigDict:
    train, _, test = files.partition(",")
    config = base_config(tiny())
    config.data.jsonl = {"train": train, "test": test or train}
    config.data.jitter = True
    config.data.sampling.num_frames = config.train.num_frames = 8
    config.train.gradient = "scan"  # the ViT learns
    config.train.batch_size = 8
    config.optim.learning_rate = 3e-4
    config.optim.groups = ((".*", 1.0),)
    return config
