"""LVU's classification tasks at full size: 100 frames of 100 seconds, one model a task.

COMMAND: python train.py --config configs/lvu.py:WEIGHTS,TASK,ANNOTATIONS,VIDEOS
           --workdir runs/lvu
Expected: nobody has trained it yet. `adacm2 plan --config configs/lvu.py --topology v5e:4x4`
tells what it needs; 189 of 7,914 million parameters learn.

WEIGHTS is a converted checkpoint (docs/porting.md) or a directory of train.py, TASK one of
lvu_relationship, lvu_way_speaking, lvu_scene, lvu_director, lvu_genre, lvu_writer and lvu_year,
ANNOTATIONS and VIDEOS what data/README.md says; WEIGHTS,TASK,BUILT takes what `python -m
data.benchmark.build TASK` made. Steps are those of twenty epochs of the annotation's windows,
where it can be counted. Windows of one's own as JSON lines:
configs/lvu.py:WEIGHTS,train.jsonl,test.jsonl, a line a window (`start`, `end`) with its question
and label; then set `train.steps`, 20 N / 64 for N windows, 93 for the shortest task. (To extend a
run later, also give `optim.warmup_steps` the value that it has: it follows `train.steps`.)

As in MA-LMM's scripts are the windows and their 100 frames (of a task, not of JSON lines, its very
numbers of frames: `data.sampling.grid`), the question, AdamW at 1e-4 with weight
decay 0.05, 64 windows a step, twenty epochs, and answers of at most four tokens by five beams.
Not as there:

* Pictures are not augmented; there each clip is randomly cropped (0.5 to 1 of the area) and
  flipped. So training sees the frames that evaluation sees, and the ViT's features can be computed
  once (docs/features.md).
* Frames are made square with antialiasing; `--config.data.resize=ma_lmm` does as MA-LMM evaluates.
  There frames are JPEGs of 256 lines, ten a second, taken at 0, 1, … 99 s of a window; here they
  are decoded at the middle of each second.
* The learning rate rises from zero through the first of the twenty epochs, then falls at every
  step. There it rises as if for 1,000 steps, stops where the first epoch ends, jumps to a cosine's
  height, and falls once an epoch.
* Matrix products are in bfloat16, learned weights in float32; there PyTorch mixes precisions by
  itself. Gradients are clipped to a norm of 1, which is this file's choice.
* The last step is evaluated; there the best epoch on the validation split is. To do as there, keep
  every epoch (`--config.checkpoint.keep_every=STEPS`) and evaluate with
  `--config.eval.select=val`.
"""

from pathlib import Path

import ml_collections

from adacm2_jax.config import instructblip_vicuna_7b
from adacm2_jax.tasks.task import every, find
from configs.base import base_config, benchmark_config


def get_config(arguments: str = "weights,train.jsonl,test.jsonl") -> ml_collections.ConfigDict:
    weights, first, *rest = arguments.split(",")
    if first in every():
        config = benchmark_config(
            first,
            ",".join([weights, *rest]),
            frames=100,
            epochs=20,
            batch_size=64,
            max_answer_len=16,
        )
        config.data.jitter = False  # windows have their frames
        return config
    if not Path(first).suffix:  # no file of JSON lines
        find(first)  # says which tasks there are
    return _of_lines(arguments)


def _of_lines(arguments: str) -> ml_collections.ConfigDict:
    weights, train, test = (arguments.split(",") + ["", ""])[:3]
    # Questions and labels are short, and every text is padded to the limit.
    model = instructblip_vicuna_7b(dtype="bfloat16", max_text_len=32, max_answer_len=16)
    config = base_config(model)
    config.init_from = weights
    config.init_missing = ("temporal_embed",)  # InstructBLIP has none
    config.data.jsonl = {"train": train, "test": test or train}
    config.data.sampling.num_frames = config.train.num_frames = 100
    config.data.workers = -1
    config.train.batch_size = 64
    config.train.steps = 2000
    config.train.chunk = 10
    config.optim.learning_rate = 1e-4
    config.optim.warmup_steps = config.train.get_ref("steps") // 20  # follows an override
    config.optim.weight_decay = 0.05
    config.optim.groups = (("(vision|llm)/.*", None), (".*", 1.0))
    config.eval.chunk = 10
    config.generation.num_beams = config.generation.num_return = 5
    config.generation.max_new_tokens = 4
    return config
