"""The experiment of a run, as a configuration file: ``--config …/of_run.py:WORKDIR``."""

import pathlib
from collections.abc import Sequence

import ml_collections

from adacm2_jax.errors import UserError
from adacm2_jax.runs.checkpoint import is_base, read_config


def get_config(workdir: str) -> ml_collections.ConfigDict:
    """What ``config.json`` holds.

    Raises:
      UserError: if there is none, or only a model's.
    """
    if is_base(workdir):
        raise UserError(
            f"--config {workdir}: a converted checkpoint has no experiment; give one, such as "
            f"configs/lvu.py:{workdir}"
        )
    return ml_collections.ConfigDict(_with_tuples(read_config(workdir)))


def named(argv: Sequence[str]) -> list[str]:
    """A command in which ``--config`` names this file where it named a run, or its config.json.

    Raises:
      UserError: for another file of JSON, or a directory that is no run's.
    """
    words = list(argv)
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name not in ("--config", "-config"):
            continue
        if not equals:
            if place + 1 == len(words):
                break
            place, name, value = place + 1, "", words[place + 1]
        path = pathlib.Path(value)
        if path.suffix == ".json" and path.name != "config.json":
            raise UserError(
                f"--config {value}: give a run's directory, its config.json, or a file of configs/"
            )
        if path.name == "config.json" or path.is_dir():
            workdir = path.parent if path.name == "config.json" else path
            get_config(str(workdir))  # says more clearly than ml_collections if there is none
            words[place] = f"{name}{'=' if name else ''}{__file__}:{workdir}"
    return words


def _with_tuples(value):
    """Lists as tuples again, which JSON does not have and overrides need."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
