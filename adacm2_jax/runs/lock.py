"""One training at a time in a directory."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from adacm2_jax.distributed import is_main
from adacm2_jax.errors import UserError

#: Held by process 0 of the job that trains there; of no meaning when nobody does.
LOCK = ".lock"


@contextlib.contextmanager
def locked(workdir: str | os.PathLike) -> Iterator[None]:
    """Holds a directory within a block; the system lets go of it when the process ends, however.

    Raises:
      UserError: in every process, if another job holds it.
    """
    with contextlib.ExitStack() as held:
        free = True
        if is_main():
            with contextlib.suppress(OSError):  # a file system without locks
                file = held.enter_context(open(pathlib.Path(workdir) / LOCK, "a"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    free = False
        if jax.process_count() > 1:
            free = bool(multihost_utils.process_allgather(np.int32(free)).min())
        if not free:
            raise UserError(
                f"{workdir}: another process is training there; wait for it, stop it, or use "
                "another --workdir"
            )
        yield
