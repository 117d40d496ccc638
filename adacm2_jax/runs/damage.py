"""Telling a damaged checkpoint from an error of the machine that reads it."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax
from etils import epath

from adacm2_jax.errors import UserError, causes


@contextlib.contextmanager
def reading(path: epath.PathLike) -> Iterator[None]:
    """Names the checkpoint whose files cannot be read; an error that is not theirs passes.

    What broken files make Orbax raise can be anything, so what is known not to be of them decides:
    memory that is full, a device, a process that is gone, a disk that does not answer.
    """
    try:
        yield
    except Exception as error:
        for cause in causes(error):
            disk = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
            if disk or isinstance(cause, jax.errors.JaxRuntimeError | MemoryError):
                raise
        raise _damaged(path, error) from error


def _damaged(path: epath.PathLike, error: Exception) -> UserError:
    path = pathlib.PurePath(path)
    first_line = str(error).strip().split("\n")[0][:120]
    remedy = f"move {path.parent} away to go on from an older step"
    if path.name == "params":
        remedy = "convert it again"
    if path.name == "frozen":
        remedy = "restore it from a copy, or train again"
    return UserError(
        f"checkpoint {path} is damaged or half-written ({type(error).__name__}: {first_line}); "
        + remedy
    )
