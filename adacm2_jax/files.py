"""Files and directories on the way: written beside, renamed when they are complete."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
from typing import Any

_MARK = ".partial-"


def beside_path(path: pathlib.Path) -> pathlib.Path:
    """Where this process writes what is to be ``path``; hidden, in the same directory."""
    return path.with_name(f".{path.name}{_MARK}{socket.gethostname()}-{os.getpid()}")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file beside, then renames it: there is never half a file."""
    path = pathlib.Path(path)
    beside = beside_path(path)
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file beside, then renames it."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def keep_earlier(path: str | os.PathLike) -> None:
    """Gives a file that is there a number, so that a new one of its name overwrites nothing.

    ``predictions.jsonl`` becomes ``predictions.1.jsonl``, or the first number that is free.
    """
    path = pathlib.Path(path)
    number = 1
    while (earlier := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    if path.exists():
        path.rename(earlier)


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
