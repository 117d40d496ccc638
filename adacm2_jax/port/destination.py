"""A directory that is complete or not there: conversions write beside it, and rename."""

import contextlib
import errno
import glob
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence

from etils import epath

from adacm2_jax.errors import UserError, causes
from adacm2_jax.files import beside_path, check_writable, remove_abandoned

#: Exit status after SIGTERM.
STOPPED = 143
_stopped = threading.Event()


def open_destination(
    path: str | os.PathLike, force: bool, sources: Sequence[str | os.PathLike]
) -> epath.Path:
    """The directory to be made, once it is certain that it can be.

    Raises:
      UserError: for what is there already, what cannot be written, and a source in its place.
    """
    remote = "://" in os.fspath(path)
    target = epath.Path(path if remote else os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise UserError(f"--dst {target} is a file; name a directory")
    if target.exists() and not force:
        raise UserError(f"--dst {target} exists; pass --force to replace it, or name another")
    if remote:
        return target
    for source in sources:
        if pathlib.Path(source).resolve().is_relative_to(target):
            raise UserError(f"--dst {path} would replace --src {source}; name another directory")
    check_writable(target.parent, f"--dst {target}")
    return target


def check_room(target: epath.Path, total: int) -> None:
    """Refuses a disk that is too small before hours of work, as far as it can be known."""
    if _is_remote(target):
        return
    place = pathlib.Path(target)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < total:
        raise UserError(
            f"{place}: {total / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; nothing "
            "was written, free some or choose another destination"
        )


def stop(*_) -> None:
    """A handler of SIGTERM that leaves nothing half-written; a second one does not disturb it."""
    if not _stopped.is_set():
        _stopped.set()
        sys.exit(STOPPED)


@contextlib.contextmanager
def written_beside(target: epath.Path) -> Iterator[epath.Path]:
    """A directory of another name, which takes the place of ``target`` if the block ends well.

    An object store cannot rename a directory: there the block writes to ``target`` itself, and a
    checkpoint is one as soon as its ``base.json`` is there, which is written last.

    Raises:
      UserError: for a disk that is full.
    """
    partial = target
    if not _is_remote(target):
        remove_abandoned(target.parent, glob.escape(target.name))
        partial = beside_path(target)
    elif target.exists():
        target.rmtree()
    try:
        partial.mkdir(parents=True)  # inside: a signal may come before the next line
        yield partial
        if _stopped.is_set():  # within a callback that lets no exception out
            sys.exit(STOPPED)
        if partial != target:
            _replace(partial, target)
    except BaseException as error:
        if partial.exists():
            partial.rmtree()
        if any(map(_is_full, causes(error))):
            raise UserError(
                f"{target.parent}: no space left on the disk; nothing was written, free some or "
                "choose another destination"
            ) from error
        raise


def _replace(partial: epath.Path, target: epath.Path) -> None:
    """Renames a directory; what has its name is removed, also what a killed process left of it."""
    replaced = target.parent / f".{target.name}.replaced"
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    if replaced.exists():
        replaced.rmtree()


def _is_remote(target: epath.Path) -> bool:
    return "://" in os.fspath(target)


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error)
