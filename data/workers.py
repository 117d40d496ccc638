"""What processes that work for this one have in common."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

from adacm2_jax.errors import show_warnings


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
