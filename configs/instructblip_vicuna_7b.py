"""The paper's model: EVA ViT-g/14, InstructBLIP's Q-Former and Vicuna-7B, on videos in JSON lines.

COMMAND: python train.py --config configs/instructblip_vicuna_7b.py:WEIGHTS,train.jsonl,test.jsonl
           --workdir runs/adacm2-7b
Expected: 7.9 billion parameters, of which 189 million learn (Q-Former, queries, ln_vision, temporal
embedding, projection); ViT and LLM stay frozen in bfloat16, 15.4 GB in all, the LLM's share of it
divided over the devices. It needs accelerators.

WEIGHTS is a converted checkpoint (docs/porting.md), or a directory of train.py. Hyper-parameters
are those of MA-LMM's scripts.
"""

import ml_collections

from adacm2_jax.config import instructblip_vicuna_7b
from configs.base import base_config


def get_config(arguments: str = "weights,train.jsonl,test.jsonl") -> ml_collections.ConfigDict:
    weights, train, test = (arguments.split(",") + ["", ""])[:3]
    config = base_config(instructblip_vicuna_7b(dtype="bfloat16"))
    config.init_from = weights
    config.init_missing = ("temporal_embed",)  # InstructBLIP has none
    config.data.jsonl = {"train": train, "test": test or train}
    config.data.prompt = "Question: {question} Short answer:"
    config.data.jitter = True
    config.data.workers = -1
    config.data.sampling.num_frames = config.train.num_frames = 100
    config.train.batch_size = 64
    config.train.steps = 10_000
    config.train.chunk = 10
    config.optim.learning_rate = 1e-4
    config.optim.warmup_steps = 1000
    config.optim.groups = (("(vision|llm)/.*", None), (".*", 1.0))
    config.generation.num_beams = 5
    config.generation.max_new_tokens = 10
    return config
