"""What processes that work for this one have in common."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

from adacm2_jax.errors import show_warnings

#: Threads of this process that read batches, where no processes do.
THREADS = 2
#: Pictures that a decoder holds at most, about: 16 references and those on their way.
_PICTURES = 24
#: Batches that each decoding process has at a time: two that are ready, one in the making.
_BATCHES = 3
_MOST_WORKERS = 256
# How many decoders of this machine's cores run at a time, as far as this process knows.
_decoders = THREADS


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def decoder_threads() -> int:
    """Threads for each decoder: its share of the cores."""
    return max(1, cores() // _decoders)


def begin_decoding(workers: int, *_: int) -> None:
    """At the beginning of a decoding process: it is one of so many."""
    global _decoders
    _decoders = max(1, workers)
    live_as_long_as_parent()


def auto_workers(cores: int, memory: int, batch: int, picture: tuple[int, int]) -> int:
    """How many decoding processes suit a machine.

    One a core, but for one core that puts batches on the devices; none where that leaves one or
    less, for threads do as well then. No more than half of the memory has room for.

    Args:
      cores: of the machine.
      memory: bytes of the machine; 0 if unknown.
      batch: bytes of a decoded batch.
      picture: width and height of a video, pixels.
    """
    each = _BATCHES * batch + _PICTURES * picture[0] * picture[1] * 3 // 2
    room = memory // 2 // each if memory else cores
    count = min(cores - 1, room, _MOST_WORKERS)
    return count if count > 1 else 0


@contextlib.contextmanager
def deaf_to_signals() -> Iterator[None]:
    """Processes that are started within the block hear neither SIGTERM nor Ctrl-C, ever.

    A signal may go to all processes of a job, or of a terminal, at any moment. What is then to be
    done is this process's to decide.
    """
    # Python starts its tracker with the first such process, and then lets both signals through.
    resource_tracker.ensure_running()
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)


def live_as_long_as_parent(*_: int) -> None:
    """At the beginning of such a process: it ends when its parent does, however that is."""
    show_warnings()
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
