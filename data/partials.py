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

    Args:
      directory: that they wrote to; others may write to it now.
      name: pattern of what they wrote.
    """
    for partial in pathlib.Path(directory).glob(f".{name}{_MARK}*"):
        # The name of another host may begin with this one's.
        host, _, process = partial.name.rpartition(_MARK)[2].rpartition("-")
        if host != socket.gethostname():
            continue
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)
        except PermissionError:
            continue  # alive, and somebody else's
