"""A directory that is complete or not there: conversions write beside it, and rename."""

import contextlib
import errno
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Iterator

from etils import epath

from adacm2_jax.errors import UserError

#: Exit status after SIGTERM.
STOPPED = 143
_stopped = threading.Event()


def check_destination(target: epath.Path, force: bool) -> None:
    """Raises ``UserError`` for what is there already."""
    if target.exists() and not force:
        raise UserError(f"--dst {target} exists; pass --force to replace it, or name another")
    if target.exists() and not target.is_dir():
        raise UserError(f"--dst {target} is a file; name a directory")


def check_room(target: epath.Path, total: int) -> None:
    """Refuses a disk that is too small before hours of work, as far as it can be known."""
    place = pathlib.Path(os.fspath(target)).absolute()
    if "://" in os.fspath(target):
        return
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < total:
        raise UserError(
            f"{place}: {total / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; nothing "
            "was written, free some or choose another destination"
        )


def stop(*_) -> None:
    """A handler of SIGTERM that leaves nothing half-written."""
    _stopped.set()
    sys.exit(STOPPED)


@contextlib.contextmanager
def written_beside(target: epath.Path, force: bool) -> Iterator[epath.Path]:
    """A directory of another name, which becomes ``target`` if the block ends well.

    An object store cannot rename a directory: there the block writes to ``target`` itself, and a
    checkpoint is one as soon as its ``base.json`` is there, which is written last.

    Raises:
      UserError: for a disk that is full.
    """
    remote = "://" in os.fspath(target)
    partial = target if remote else target.parent / f".{target.name}.partial"
    if partial.exists():
        partial.rmtree()  # of a conversion that was killed; of an object store, what is replaced
    partial.mkdir(parents=True)
    try:
        yield partial
        if _stopped.is_set():  # within a callback that lets no exception out
            sys.exit(STOPPED)
        if not remote:
            replaced = target.parent / f".{target.name}.replaced"
            if target.exists() and force:
                target.rename(replaced)
            partial.rename(target)
            if replaced.exists():
                replaced.rmtree()
    except BaseException as error:
        if partial.exists():
            partial.rmtree()
        if _is_full(error):
            raise UserError(
                f"{target.parent}: no space left on the disk; nothing was written, free some or "
                "choose another destination"
            ) from error
        raise


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
