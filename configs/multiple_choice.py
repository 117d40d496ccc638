"""Benchmarks with choices and no training split: Video-MME, MLVU, EgoSchema and others, evaluated.

COMMAND: python eval.py --config configs/multiple_choice.py:WEIGHTS,TASK,ANNOTATIONS,VIDEOS
           --workdir WEIGHTS --output runs/video_mme
Expected: nobody has evaluated it with published weights yet.

TASK is one of docs/tasks.md, such as `video_mme` or `video_mme_ranked` (the most probable choice
is the answer). WEIGHTS is a run of train.py or a converted checkpoint, ANNOTATIONS and VIDEOS as
data/README.md says. All is our choice but the questions: a frame a second, at most 1,024 of them
(then evenly spread), prompts of adacm2_jax/tasks/multiple_choice.py, greedy answers of at most
eight tokens. A question that is asked at a moment of the video is answered from what came before.
"""

import ml_collections

from adacm2_jax.tasks.task import find
from configs.base import benchmark_config


def get_config(
    arguments: str = "weights,video_mme,annotations,videos",
) -> ml_collections.ConfigDict:
    weights, task, rest = (arguments.split(",", 2) + ["", ""])[:3]
    config = benchmark_config(
        find(task).name,
        f"{weights},{rest}",
        frames=100,
        epochs=1,
        batch_size=64,
        max_text_len=256,
        max_answer_len=64,
    )
    config.data.sampling.mode, config.data.sampling.grid = "fps", 0.0
    config.data.sampling.max_frames = 1024
    return config
