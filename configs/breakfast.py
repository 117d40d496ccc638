"""Breakfast at full size: which of ten breakfasts is made, from 100 frames of the whole video.

COMMAND: python train.py --config configs/breakfast.py:WEIGHTS,ANNOTATIONS,VIDEOS
           --workdir runs/breakfast
Expected: nobody has trained it yet. `adacm2 plan --config configs/breakfast.py --topology
v5e:4x4` tells what it needs; 189 of 7,914 million parameters learn.

WEIGHTS is a converted checkpoint (docs/porting.md) or a directory of train.py, ANNOTATIONS the
annotation and VIDEOS its videos (data/README.md); WEIGHTS,BUILT takes what `python -m
data.benchmark.build breakfast` made. Steps are those of all epochs of the annotation, 1,000 where
it cannot be counted. Three training videos are left out, as there.

As in MA-LMM's scripts are the frames (100, in evaluation `rint(linspace)` over ten a second, in
training one drawn from each of as many equal parts), the prompt, AdamW at 0.0001 with weight
decay 0.05, 64 clips a step, 20 epochs, and how answers are written. Not as there: pictures are
not cropped and flipped in training, frames are decoded at their time instead of read from JPEGs
of 256 lines (a directory of such JPEGs is read, too), gradients are clipped to a norm of 1, and
the learning rate follows one cosine after a warm-up of an epoch. What the paper does not say is
MA-LMM's here, or the default of adacm2_jax/runs/experiment.py.

There the best epoch is chosen on the very split that is reported; here the last step is
evaluated. To do as there, keep every epoch (`--config.checkpoint.keep_every=STEPS`) and let
`eval.py --config.eval.select=test` choose among them, and say so.
"""

import ml_collections

from configs.base import benchmark_config


def get_config(arguments: str = "weights,annotations,videos") -> ml_collections.ConfigDict:
    return benchmark_config(
        "breakfast",
        arguments,
        frames=100,
        epochs=20,
        batch_size=64,
        max_answer_len=20,
    )
