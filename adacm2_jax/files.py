"""Files and directories on the way: written beside, renamed when they are complete."""

from __future__ import annotations

import os
import pathlib
import shutil
import socket

_MARK = ".partial-"


def beside_path(path: pathlib.Path) -> pathlib.Path:
    """Where this process writes what is to be ``path``; hidden, in the same directory."""
    return path.with_name(f".{path.name}{_MARK}{socket.gethostname()}-{os.getpid()}")


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
