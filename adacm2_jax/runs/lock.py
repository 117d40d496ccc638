"""One process at a time that writes in a directory: a training, or an evaluation."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from adacm2_jax.distributed import is_main
from adacm2_jax.errors import UserError, printable

#: Held by process 0 of the job that writes there; of no meaning when nobody does.
LOCK = ".lock"


@contextlib.contextmanager
def locked(
    directory: str | os.PathLike,
    flag: str = "--workdir",
    held_by: str = "another process is writing there",
) -> Iterator[None]:
    """Holds a directory within a block; the system lets go of it when the process ends, however.

    Args:
      directory: that is there.
      flag: that names another directory.
      held_by: what is said of whoever holds it.

    Raises:
      UserError: in every process, if another job holds it.
    """
    with contextlib.ExitStack() as held:
        free = True
        if is_main():
            with contextlib.suppress(OSError):  # a file system without locks
                file = held.enter_context(open(pathlib.Path(directory) / LOCK, "a"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    free = False
        if jax.process_count() > 1:
            free = bool(multihost_utils.process_allgather(np.int32(free)).min())
        if not free:
            raise UserError(
                f"{printable(os.fspath(directory))}: {held_by}; wait for it, stop it, or use "
                f"another {flag}"
            )
        yield


@contextlib.contextmanager
def locked_output(output: str | os.PathLike) -> Iterator[None]:
    """Makes a directory for results and holds it within a block.

    Two that wrote there at the same time would lose each other's predictions.

    Raises:
      UserError: in every process, if another job holds it.
    """
    if is_main():
        pathlib.Path(output).mkdir(parents=True, exist_ok=True)
    with locked(output, "--output"):
        yield
