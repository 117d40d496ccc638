"""Captions of YouCook2's steps at full size, from 80 frames of each.

COMMAND: python train.py --config configs/youcook2_captions.py:WEIGHTS,ANNOTATIONS,VIDEOS
           --workdir runs/youcook2_captions
Expected: nobody has trained it yet. `adacm2 plan --config configs/youcook2_captions.py --topology
v5e:4x4` tells what it needs; 189 of 7,914 million parameters learn.

WEIGHTS is a converted checkpoint (docs/porting.md) or a directory of train.py, ANNOTATIONS the
annotation and VIDEOS its videos (data/README.md); WEIGHTS,BUILT takes what `python -m
data.benchmark.build youcook2_captions` made. Steps are those of all epochs of the annotation,
1,000 where it cannot be counted. The captions of the test split are not published, so `val` is
evaluated.

As in MA-LMM's scripts are the frames (80, in evaluation `rint(linspace)` over ten a second, in
training one drawn from each of as many equal parts), the prompt, AdamW at 0.0001 with weight
decay 0.05, 128 clips a step, 10 epochs, and how answers are written. Not as there: pictures are
not cropped and flipped in training, frames are decoded at their time instead of read from JPEGs
of 256 lines (a directory of such JPEGs is read, too), gradients are clipped to a norm of 1, and
the learning rate follows one cosine after a warm-up of an epoch. What the paper does not say is
MA-LMM's here, or the default of adacm2_jax/runs/experiment.py.

There the best epoch is chosen on the very split that is reported; here the last step is
evaluated. To do as there, keep every epoch (`--config.checkpoint.keep_every=STEPS`) and let
`eval.py --config.eval.select=val` choose among them, and say so.
"""

import ml_collections

from configs.base import benchmark_config


def get_config(arguments: str = "weights,annotations,videos") -> ml_collections.ConfigDict:
    config = benchmark_config(
        "youcook2_captions",
        arguments,
        frames=80,
        epochs=10,
        batch_size=128,
        max_answer_len=32,
    )
    config.eval.split = "val"
    return config
