"""What runs of ``train.py`` leave on disk, to be compared bit by bit."""

import contextlib
import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath


def steps_of(workdir: pathlib.Path) -> list[int]:
    """The steps whose checkpoint is complete, by its name."""
    directory = workdir / "checkpoints"
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def leaves(tree) -> dict[str, tuple]:
    """Every array of a tree by its path: type, shape and bytes."""
    arrays = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()}


def read_step(workdir: pathlib.Path, step: int) -> dict[str, dict]:
    """All that a checkpoint holds, by part."""
    directory = workdir.absolute() / "checkpoints" / str(step)
    parts = {}
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        for part in ("learned", "optimizer"):
            # As numpy: several processes may have written it.
            stored = handler.metadata(epath.Path(directory / part)).tree
            places = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
            args = ocp.args.PyTreeRestore(restore_args=places)
            parts[part] = leaves(handler.restore(epath.Path(directory / part), args=args))
    files = sorted(path for path in (directory / "data").rglob("*") if path.is_file())
    place = [json.loads(path.read_text()) for path in files if path.name == "metadata"]
    return parts | {"data": {"examples": place[0]["examples"]}}


def check_finite(parts: dict[str, dict]) -> None:
    for part in ("learned", "optimizer"):
        for name, (dtype, _, values) in parts[part].items():
            if not np.isfinite(np.frombuffer(values, dtype)).all():
                raise ValueError(f"{part}: {name} is not finite")


def differences(first: pathlib.Path, second: pathlib.Path) -> list[str]:
    """What is not the same, bit by bit, in the newest checkpoints of two runs."""
    steps = [max(steps_of(run), default=None) for run in (first, second)]
    if steps[0] != steps[1] or steps[0] is None:
        return [f"newest step: {steps[0]} and {steps[1]}"]
    one, other = (read_step(run, steps[0]) for run in (first, second))
    found = []
    for part in one:
        found += [f"{part}: {n} is in one alone" for n in one[part].keys() ^ other[part].keys()]
        both = one[part].keys() & other[part].keys()
        found += [f"{part}: {name}" for name in both if one[part][name] != other[part][name]]
    return found


def losses(workdir: pathlib.Path) -> list[float]:
    """The loss of every step, in order, each once."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]
