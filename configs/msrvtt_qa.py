"""MSR-VTT-QA at full size: one word, written freely, from 20 frames.

COMMAND: python train.py --config configs/msrvtt_qa.py:WEIGHTS,ANNOTATIONS,VIDEOS
           --workdir runs/msrvtt_qa
Expected: nobody has trained it yet. `adacm2 plan --config configs/msrvtt_qa.py --topology
v5e:4x4` tells what it needs; 189 of 7,914 million parameters learn.

WEIGHTS is a converted checkpoint (docs/porting.md) or a directory of train.py, ANNOTATIONS the
annotation and VIDEOS its videos (data/README.md); WEIGHTS,BUILT takes what `python -m
data.benchmark.build msrvtt_qa` made. Steps are those of all epochs of the annotation, 1,000 where
it cannot be counted.

As in MA-LMM's scripts are the frames (20, in evaluation `rint(linspace)` over ten a second, in
training one drawn from each of as many equal parts), the prompt, AdamW at 0.0001 with weight
decay 0.05, 128 clips a step, 5 epochs, and how answers are written. Not as there: pictures are
not cropped and flipped in training, frames are decoded at their time instead of read from JPEGs
of 256 lines (a directory of such JPEGs is read, too), gradients are clipped to a norm of 1, and
the learning rate follows one cosine after a warm-up of an epoch. What the paper does not say is
MA-LMM's here, or the default of adacm2_jax/runs/experiment.py.

The last step is evaluated on the test split. To choose an epoch, keep each
(`--config.checkpoint.keep_every=STEPS`) and let `eval.py --config.eval.select=val` choose among
them, which evaluates the chosen one on the test split.
"""

import ml_collections

from configs.base import benchmark_config


def get_config(arguments: str = "weights,annotations,videos") -> ml_collections.ConfigDict:
    return benchmark_config(
        "msrvtt_qa",
        arguments,
        frames=20,
        epochs=5,
        batch_size=128,
        max_answer_len=10,
        max_text_len=64,
    )
