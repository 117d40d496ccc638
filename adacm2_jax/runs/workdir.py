"""What a run leaves on disk, and where a model's parameters are.

::

    workdir/config.json                 the experiment, written once
    workdir/{qformer,llm}_tokenizer/    Hugging Face tokenizers
    workdir/frozen/                     parameters that never change, written once (if any)
    workdir/frozen.json                 or where they are: a converted checkpoint, its fingerprint
    workdir/checkpoints/<step>/         learned parameters, optimiser, place in the data

A converted checkpoint (``adacm2 port``), called a base, holds ``config.json`` with
the model alone, the tokenizers, ``params/`` with all parameters and ``base.json``, which says where
they are from. A run that starts from a base does not copy what it leaves as it is; what counts is
the base's fingerprint, not its place.

A step's directory gets its name when it is complete, so a process that is killed while it saves
leaves a directory with a temporary name, which nobody reads. One that is killed while it removes an
old step may leave a part of that; the newest step is then complete.

Of several processes each writes its shards, process 0 all else; the directory must be one that all
of them share. Nothing on disk depends on the mesh or on the number of processes.
"""

import fnmatch
import json
import os

from etils import epath

from adacm2_jax.distributed import is_main
from adacm2_jax.errors import UserError, printable
from adacm2_jax.files import write_json

#: Directory of all parameters in a converted checkpoint.
PARAMS_DIR = "params"
#: Of a run that starts from a base: where that is, and its fingerprint.
LINK = "frozen.json"


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """The complete steps of a run, the newest last."""
    checkpoints = epath.Path(workdir) / "checkpoints"
    # Not by a pattern, of which the directory's own name would be a part.
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def is_base(directory: str | os.PathLike) -> bool:
    """Whether this is a converted checkpoint, complete."""
    return (epath.Path(directory) / "base.json").exists()


def read_base(directory: str | os.PathLike) -> dict:
    """What a converted checkpoint says of itself: ``fingerprint``, ``sources`` …; {} for a run."""
    return _read_json(epath.Path(directory) / "base.json")


def read_link(workdir: str | os.PathLike) -> dict:
    """``path`` and ``fingerprint`` of the base that a run has its frozen parameters of; or {}."""
    return _read_json(epath.Path(workdir) / LINK)


def write_link(workdir: str | os.PathLike, base: str | os.PathLike) -> None:
    """Notes where the base of a run is; process 0 alone does."""
    link = {"path": str(absolute(base)), "fingerprint": read_base(base)["fingerprint"]}
    if is_main():
        write_json(epath.Path(workdir) / LINK, link)


def find_base(workdir: str | os.PathLike, init_from: str = "") -> epath.Path | None:
    """The base that a run has its frozen parameters of; None if it keeps them itself.

    Args:
      workdir: of the run.
      init_from: where the base may be now; else it is where it was when the run started.

    Raises:
      UserError: if it is in neither place.
    """
    link = read_link(workdir)
    if not link:
        return None
    found = []
    for place in filter(None, dict.fromkeys([init_from, link["path"]])):
        fingerprint = read_base(place).get("fingerprint")
        if fingerprint == link["fingerprint"]:
            return absolute(place)
        what = f"another one, fingerprint {fingerprint[:12]}" if fingerprint else "none"
        found.append(f"there is {what} at {place}")
    raise UserError(
        f"{workdir} needs the converted checkpoint with fingerprint {link['fingerprint'][:12]} for "
        f"its frozen parameters, but {' and '.join(found)}; if it has moved, name its place: "
        "--config.init_from=NEW"
    )


def param_trees(
    directory: str | os.PathLike, step: int | None = None, base: str = ""
) -> list[epath.Path]:
    """The Orbax trees, with flat names, that make up a model; of a path that is in several, the
    first counts.

    Args:
      directory: of a run, or of a converted checkpoint.
      step: of a run: which; by default the newest.
      base: see :func:`find_base`.

    Raises:
      UserError: if there is none.
    """
    root = absolute(directory)
    if is_base(root):
        return [root / PARAMS_DIR]
    if (root / PARAMS_DIR).exists():
        raise UserError(f"{root} is half of a converted checkpoint; convert it again")
    steps = saved_steps(root)
    if not steps:
        raise UserError(f"{root}: no checkpoint here; train first, or name another directory")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise UserError(f"{root}: no checkpoint of step {step}; there are {steps}")
    frozen = [root / "frozen"] if (root / "frozen").exists() else []
    linked = find_base(root, base)
    frozen += [linked / PARAMS_DIR] if linked else []
    return [root / "checkpoints" / str(step) / "learned", *frozen]


def absolute(directory: str | os.PathLike) -> epath.Path:
    """The whole path, without ``..``, which Orbax does not take; an address in a bucket stays as
    it is."""
    path = epath.Path(directory)
    if "://" in os.fspath(directory):
        return path
    return path.resolve() if ".." in path.parts else path.absolute()


def check_path(directory: str | os.PathLike, what: str) -> None:
    """Refuses a directory in which checkpoints would be written that nobody can read.

    Orbax looks for what it has written by a pattern that begins with the path, and leaves out of a
    checkpoint what it does not find.

    Args:
      directory: that they are to be written to.
      what: begins the message: a flag and its value.

    Raises:
      UserError: if its path, as a pattern, is another one.
    """
    for part in absolute(directory).parts:
        if not fnmatch.fnmatchcase(part, part):
            raise UserError(
                f"{printable(what)}: no checkpoint can be written there, for Orbax takes the "
                f"brackets of {printable(part)!r} for a pattern; rename it, or name another "
                "directory"
            )


def write_config(workdir: str | os.PathLike, config: dict) -> None:
    """Writes ``config.json`` beside, then renames it; process 0 alone does."""
    if is_main():
        write_json(epath.Path(workdir) / "config.json", config)


def read_config(workdir: str | os.PathLike) -> dict:
    """The experiment that made a run.

    Raises:
      UserError: if there is none, or it is no JSON.
    """
    path = epath.Path(workdir) / "config.json"
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{workdir}: no config.json here; is this a directory of train.py?"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); restore it from where the run was started"
        ) from None


def _read_json(path: epath.Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}
