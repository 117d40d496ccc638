"""The defaults around a model, as fields that can be overridden; the experiments beside this file
change a few.

Every field, its default and what it means: adacm2_jax/runs/experiment.py and docs/configuration.md.
A field is overridden on the command line as ``--config.train.steps=100``; one that does not exist
is an error.
"""

import math
from pathlib import Path

import ml_collections

from adacm2_jax.config import AdaCM2Config, instructblip_vicuna_7b
from adacm2_jax.runs.experiment import Experiment, to_dict
from adacm2_jax.tasks.task import find


def base_config(model: AdaCM2Config) -> ml_collections.ConfigDict:
    """The defaults around a model."""
    return ml_collections.ConfigDict(to_dict(Experiment(model), plain=False))


def benchmark_config(
    task: str,
    arguments: str,
    *,
    frames: int,
    epochs: int,
    batch_size: int,
    learning_rate: float = 1e-4,
    max_answer_len: int,
    max_text_len: int = 32,
) -> ml_collections.ConfigDict:
    """A benchmark at full size, with what MA-LMM's scripts say of all of them.

    Args:
      task: its name in ``adacm2_jax.tasks``.
      arguments: ``WEIGHTS,ANNOTATIONS,VIDEOS``, or ``WEIGHTS,BUILT`` for what
        ``python -m data.benchmark.build`` made.
      frames: T of a video.
      epochs: of training.
      batch_size: clips of a step.
      learning_rate: at its height.
      max_answer_len: tokens of a training answer.
      max_text_len: tokens of a question.
    """
    weights, annotations, videos = (arguments.split(",") + ["", ""])[:3]
    model = instructblip_vicuna_7b(
        dtype="bfloat16", max_text_len=max_text_len, max_answer_len=max_answer_len
    )
    config = base_config(model)
    config.init_from = weights
    config.init_missing = ("temporal_embed",)  # InstructBLIP has none
    config.data.source = "task"
    config.data.task.name = task
    config.data.task.annotations, config.data.task.videos = annotations, videos
    if not videos:
        config.data.task.annotations, config.data.task.built = "", annotations
    config.data.prompt = find(task).prompt
    config.data.jitter = True
    config.data.sampling.num_frames = config.train.num_frames = frames
    config.data.sampling.grid = 10.0
    config.data.workers = -1
    config.train.batch_size = batch_size
    config.train.steps = _steps(task, annotations if videos else "", epochs, batch_size)
    config.train.chunk = 10
    config.optim.learning_rate = learning_rate
    config.optim.warmup_steps = config.train.get_ref("steps") // epochs  # follows an override
    config.optim.weight_decay = 0.05
    config.optim.groups = (("(vision|llm)/.*", None), (".*", 1.0))
    config.eval.chunk = 10
    config.generation.update(find(task).generation)
    return config


def _steps(task: str, annotations: str, epochs: int, batch_size: int) -> int:
    """Of all epochs, where the annotation is at hand to count its questions; else 1,000."""
    if not annotations or not Path(annotations).is_dir() or "train" not in find(task).splits:
        return 1000
    count = len(find(task).read(Path(annotations), "train"))
    return max(math.floor(epochs * count / batch_size), 1)
