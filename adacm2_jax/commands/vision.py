"""A small ViT made from labelled images, as what an experiment starts from (``init_from``)."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from adacm2_jax.inference.processor import train_tokenizers
from adacm2_jax.port.base import write_base
from adacm2_jax.port.store import LazyArray
from adacm2_jax.runs.experiment import Experiment
from adacm2_jax.training.pretrain import LabelledImages, pretrain_vision
from data.sources import open_source


def make_vision(
    directory: pathlib.Path,
    experiment: Experiment,
    batches: Iterator[LabelledImages],
    classes: Mapping[str, int],
    *,
    steps: int,
    learning_rate: float,
    sources: Sequence[str],
) -> None:
    """Trains the ViT and writes it with tokenizers that know the texts of the training clips.

    Args:
      directory: to be made.
      experiment: whose ViT, seed and training clips they are.
      batches, classes, steps, learning_rate: of ``training.pretrain.pretrain_vision``.
      sources: where the images come from, for ``base.json``.
    """
    params = pretrain_vision(
        experiment.model.vision,
        batches,
        classes,
        steps=steps,
        learning_rate=learning_rate,
        seed=experiment.seed,
    )
    clips = open_source(experiment.data, "train")
    texts = (text for clip in clips for text in (clip.question, clip.answer))
    write_base(
        epath.Path(directory),
        experiment.model,
        {path: LazyArray.of(values) for path, values in params.items()},
        train_tokenizers(texts, experiment.model),
        sources=sources,
    )
