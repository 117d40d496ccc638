"""The experiment of a run, as a configuration file: ``--config …/of_run.py:DIRECTORY``."""

import pathlib
from collections.abc import Sequence
from typing import Any

from adacm2_jax.errors import UserError
from adacm2_jax.runs.experiment import to_dict
from adacm2_jax.runs.load import experiment_of


def get_config(directory: str) -> Any:
    """The ``ConfigDict`` of a run, or of a converted checkpoint.

    Raises:
      UserError: if the directory is neither.
    """
    from ml_collections import ConfigDict

    return ConfigDict(to_dict(experiment_of(directory), plain=False))


def named(argv: Sequence[str]) -> list[str]:
    """A command in which ``--config`` names this file where it named a run, or its config.json.

    Raises:
      UserError: for another file of JSON, or a directory that is no run's.
    """
    words = list(argv)
    for place, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name not in ("--config", "-config") or not (equals or place + 1 < len(words)):
            continue
        path = pathlib.Path(value if equals else words[place + 1])
        if path.suffix == ".json" and path.name != "config.json":
            raise UserError(
                f"--config {path}: give a run's directory, its config.json, or a file of configs/"
            )
        if path.name == "config.json" or path.is_dir():
            directory = path.parent if path.name == "config.json" else path
            experiment_of(directory)  # says more clearly than ml_collections if there is none
            mine = f"{__file__}:{directory}"
            words[place if equals else place + 1] = f"{name}={mine}" if equals else mine
    return words
