"""The models of the suite of generated tasks: a ViT, then the stages of ``configs/suite.py``."""

import argparse
import pathlib
import time
from collections.abc import Callable, Sequence

import ml_collections

from adacm2_jax.commands import vision
from adacm2_jax.commands.ablate import ablate
from adacm2_jax.commands.ablate_flags import add_flags
from adacm2_jax.commands.train import train_and_evaluate
from adacm2_jax.runs.experiment import Experiment, read
from adacm2_jax.runs.workdir import is_base, saved_steps
from configs import suite
from data.suite.drawn import LABELS, labelled_frames

#: Changes a stage's configuration.
Change = Callable[[ml_collections.ConfigDict], None]


def unchanged(_: ml_collections.ConfigDict) -> None:
    """The configuration as it stands."""


def experiment_of(
    stage: str,
    root: pathlib.Path,
    seed: int,
    styles: Sequence[str] = ("grounds",),
    change: Change = unchanged,
) -> Experiment:
    """A stage of ``configs/suite.py``, with a seed's own videos, in every split.

    Args:
      stage: of ``configs.suite.STAGES``.
      root: beside which the stage's directory and that which it starts from lie.
      seed: of the model and the videos.
      styles: of the videos.
      change: applied last.
    """
    config = suite.get_config(stage)
    config.seed = config.data.suite.seed = seed
    config.init_from = str(root / suite.STAGES[stage].start)
    config.data.data_dir = str(root.parent / "data")
    config.data.suite.styles = tuple(styles)
    config.data.suite.test_size = 1  # a study says what it asks
    config.checkpoint.every, config.checkpoint.keep = 200, 1
    change(config)
    return read(config)


def make_vision(root: pathlib.Path, seed: int, styles: Sequence[str] = ("grounds",)) -> None:
    """Makes the ViT, with the tokenizers beside it, unless it is there: ``root/vision``."""
    if is_base(root / "vision"):
        return
    batch_size, steps, learning_rate = suite.VISION
    if len(styles) > 1:
        steps *= 3
    print(f"the ViT: {steps} steps, each of {batch_size} frames", flush=True)
    first = experiment_of("first", root, seed, styles)
    data, size = first.data.suite, first.model.vision.image_size
    vision.make_vision(
        root / "vision",
        first,
        labelled_frames(batch_size, size, data.styles, data.share, seed),
        LABELS,
        steps=steps,
        learning_rate=learning_rate,
        sources=["data/suite/drawn.py"],
    )


def train(
    root: pathlib.Path,
    seed: int,
    styles: Sequence[str] = ("grounds",),
    change: Change = unchanged,
) -> None:
    """Trains the stages that are not done yet, or goes on with one that was stopped."""
    begun = time.perf_counter()
    make_vision(root, seed, styles)
    done = [
        _train(experiment_of(stage, root, seed, styles, change), root / stage)
        for stage in suite.STAGES
    ]
    if any(done):
        print(f"{root}: {(time.perf_counter() - begun) / 60:.1f} minutes", flush=True)


def train_on(root: pathlib.Path, seed: int, name: str, change: Change) -> None:
    """Goes on with the last stage's model, in a run of its own beside it."""

    def start(config: ml_collections.ConfigDict) -> None:
        change(config)
        config.init_from = str(root / "main")

    begun = time.perf_counter()
    if _train(experiment_of("main", root, seed, change=start), root / name):
        print(f"{root / name}: {(time.perf_counter() - begun) / 60:.1f} minutes", flush=True)


def _train(experiment: Experiment, workdir: pathlib.Path) -> bool:
    """Whether there was anything to do."""
    if saved_steps(workdir)[-1:] == [experiment.train.steps]:
        return False
    train_and_evaluate(experiment, workdir, at_the_end=False)
    return True


def compare(*words: str | pathlib.Path | int) -> None:
    """``adacm2 ablate`` with these words of its command line; ends as it does, if it fails."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    if status := ablate(parser.parse_args([str(word) for word in words])):
        raise SystemExit(status)
