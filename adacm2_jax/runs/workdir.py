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

import contextlib
import fnmatch
import json
import os
from collections.abc import Iterator

from etils import epath

from adacm2_jax.distributed import is_main
from adacm2_jax.errors import UserError, printable, reason
from adacm2_jax.files import write_json

#: Directory of all parameters in a converted checkpoint.
PARAMS_DIR = "params"
#: Of a run that starts from a base: where that is, and its fingerprint.
LINK = "frozen.json"
#: Fields of a model that had other names when it was stored.
_RENAMED = {"fused_attention": "fused_vision"}


def saved_steps(workdir: str | os.PathLike) -> list[int]:
    """The complete steps of a run, the newest last."""
    checkpoints = epath.Path(workdir) / "checkpoints"
    # Not by a pattern, of which the directory's own name would be a part.
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def is_base(directory: str | os.PathLike) -> bool:
    """Whether this is a converted checkpoint, complete."""
    with _finding(directory):
        return (epath.Path(directory) / "base.json").exists()


def read_base(directory: str | os.PathLike) -> dict:
    """What a converted checkpoint says of itself: ``fingerprint``, ``sources`` …; {} for a run."""
    return _read_texts(epath.Path(directory) / "base.json", "fingerprint")


def read_link(workdir: str | os.PathLike) -> dict:
    """``path`` and ``fingerprint`` of the base that a run has its frozen parameters of; or {}."""
    return _read_texts(epath.Path(workdir) / LINK, "path", "fingerprint")


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
    """The experiment that made a run, or the model of a converted checkpoint.

    Raises:
      UserError: if there is none, or it is no table of JSON with a model.
    """
    with _finding(workdir):
        path = epath.Path(workdir) / "config.json"
        if not path.exists() and not os.path.islink(path):
            below = sorted(found.parent.name for found in epath.Path(workdir).glob("*/config.json"))
            hint = f"did you mean {epath.Path(workdir) / below[0]}" if below else ""
            hint = hint or "is this a directory of train.py"
            raise UserError(f"{workdir}: no config.json here; {hint}?")
    values = _read_json(path)
    if not isinstance(values.get("model"), dict):
        raise damaged(path, "it holds no model")
    for old, new in _RENAMED.items():
        if old in values["model"]:
            values["model"][new] = values["model"].pop(old)
    return values


def damaged(path: str | os.PathLike, why: str) -> UserError:
    """What to say of a file of a run, or of a converted checkpoint, that cannot be used."""
    return UserError(
        f"{os.fspath(path)} is damaged ({why}); restore it from where the run was started, or "
        "from a copy"
    )


def _read_texts(path: epath.Path, *names: str) -> dict:
    """A table that must have texts under some names; {} if there is no such file."""
    with _finding(path.parent):
        if not path.exists() and not os.path.islink(path):
            return {}
    values = _read_json(path)
    for name in names:
        if not (isinstance(values.get(name), str) and values[name]):
            raise damaged(path, f"it has no text {name!r}")
    return values


def _read_json(path: epath.Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise damaged(path, error.strerror or reason(error)) from None
    except RecursionError:
        raise damaged(path, "it is nested too deeply") from None
    except ValueError as error:
        raise damaged(path, printable(reason(error))) from None
    if not isinstance(values, dict):
        raise damaged(path, f"it holds {printable(json.dumps(values)[:40])} and no table")
    return values


@contextlib.contextmanager
def _finding(directory: str | os.PathLike) -> Iterator[None]:
    """Names a directory that cannot even be looked for."""
    try:
        yield
    except OSError as error:
        shown = printable(os.fspath(directory)[:80])
        raise UserError(f"{shown}: {error.strerror or reason(error)}; correct the path") from None
    except ImportError as error:  # of what opens this kind of bucket
        shown = printable(os.fspath(directory)[:80])
        raise UserError(
            f"{shown} cannot be opened ({printable(reason(error))}); install that, or name a "
            "directory of a mounted file system"
        ) from None
