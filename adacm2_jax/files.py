"""Files and directories: what cannot be read is named, what is written gets its name at the end."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import socket
import tempfile
from typing import Any, TypeVar

from adacm2_jax.errors import UserError, printable

Path = TypeVar("Path", bound=pathlib.PurePath)
_MARK = ".partial-"
_POINTER = b"version https://git-lfs"


def check_pointer(file: pathlib.Path) -> None:
    """Refuses the few lines that stand for a file as long as git-lfs has not fetched it.

    Raises:
      UserError: naming the file.
    """
    with open(file, "rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise UserError(
                f"{file} is a pointer of git-lfs, not the file itself; run `git lfs pull` in "
                f"{file.parent}, or download it"
            )


def read_json(file: pathlib.Path) -> dict:
    """The table in a JSON file that came with a checkpoint.

    Raises:
      UserError: if it is missing, damaged, a pointer of git-lfs, or holds no table.
    """
    try:
        check_pointer(file)
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file} is missing; copy it from where the checkpoint is") from None
    try:
        values = json.loads(content)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); copy it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: it holds no table; copy it again")
    return values


def check_writable(directory: str | os.PathLike, what: str) -> None:
    """Makes sure, before long work, that a directory can be made or written to; makes nothing.

    Args:
      directory: a local one, which need not be there, nor those above it.
      what: begins the message: a flag and its value.

    Raises:
      UserError: if it or one above it is a file, a link that leads nowhere, or may not be written
        to, or has a name that the file system does not take.
    """
    place = pathlib.Path(directory).absolute()
    lacking = []
    while not os.path.lexists(place) and place != place.parent:
        lacking.append(place.name)
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=place) as trial:
            for name in set(lacking) - {".."}:
                os.mkdir(os.path.join(trial, name))
        with contextlib.suppress(FileNotFoundError):
            os.stat(directory)  # the whole path may be too long
    except OSError as error:
        nowhere = place.is_symlink() and not os.path.exists(place)
        reason = "a link that leads nowhere" if nowhere else error.strerror
        raise UserError(
            f"{printable(what)}: nothing can be written to {printable(str(place))} ({reason}); "
            "name another directory"
        ) from None


def beside_path(path: Path) -> Path:
    """Where this process writes what is to be ``path``; hidden, in the same directory."""
    return path.with_name(f".{path.name}{_MARK}{socket.gethostname()}-{os.getpid()}")


def write_text(path: str | pathlib.Path, text: str) -> None:
    """Writes a file beside, then renames it: there is never half a file."""
    write_bytes(path, text.encode())


def write_bytes(path: str | pathlib.Path, content: bytes) -> None:
    """Writes a file beside, then renames it."""
    path = pathlib.Path(path) if isinstance(path, str) else path  # an epath stays one
    beside = beside_path(path)
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: str | pathlib.Path, value: Any) -> None:
    """Writes a JSON file beside, then renames it."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def keep_earlier(*paths: str | os.PathLike) -> None:
    """Gives files that are there a number, so that new ones of their names overwrite nothing.

    ``predictions.jsonl`` becomes ``predictions.1.jsonl``, or the first number that is free. Files
    that belong together get the same number.
    """

    def earlier(path: pathlib.Path) -> pathlib.Path:
        return path.with_name(f"{path.stem}.{number}{path.suffix}")

    files, number = [pathlib.Path(path) for path in paths], 1
    while any(earlier(path).exists() for path in files):
        number += 1
    for path in files:
        if path.exists():
            path.rename(earlier(path))


def remove_abandoned(directory: str | os.PathLike, name: str = "*") -> None:
    """Removes what killed processes of this machine left: it may be many gigabytes.

    Called before this process writes there: what bears its own number is then of an earlier one,
    as in a container, where a restarted program gets the same number.

    Args:
      directory: that they wrote to; others may write to it now.
      name: pattern of what they wrote.
    """
    for partial in pathlib.Path(directory).glob(f".{name}{_MARK}*"):
        # The name of another host may begin with this one's.
        host, _, process = partial.name.rpartition(_MARK)[2].rpartition("-")
        if host != socket.gethostname():
            continue
        if int(process) != os.getpid() and _is_alive(int(process)):
            continue
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True
