"""Ctrl-C ends a command in one line, with status 130 and never a traceback, whatever it is doing.

Two ways, for two times. While a command imports what it needs, and after its end, nothing is open:
:func:`end_at_once`. In between files are to be closed and workers ended: :func:`raised`.

It imports nothing heavy: a script calls it before all other imports, which take seconds.
"""

import contextlib
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

STATUS = 128 + signal.SIGINT
#: Seconds after which an interrupt that was lost is raised again.
_AGAIN = 0.1


def end_at_once() -> None:
    """From here on the handler of Ctrl-C itself ends the process.

    An exception would be shown with its traceback, or be turned into another by who imports.
    """
    if _is_ours():
        signal.signal(signal.SIGINT, _end)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Ctrl-C within the block is a ``KeyboardInterrupt`` that certainly leaves it.

    Python drops what is raised within a destructor or a callback of the garbage collector, of which
    JAX has one; libraries drop or translate what they do not expect. What is dropped is raised
    again, and another error in its place is not shown. A second Ctrl-C ends the process at once.

    Raises:
      KeyboardInterrupt: after Ctrl-C, however the block has ended.
    """
    if not _is_ours():
        yield
        return
    handler = _Handler()
    before, hook = signal.signal(signal.SIGINT, handler), sys.unraisablehook
    sys.unraisablehook = lambda lost: None if _is_interrupt(lost) else hook(lost)
    try:
        yield
    except BaseException:
        if not handler.asked:
            raise
    finally:
        handler.active = False
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)
    if handler.asked:
        raise KeyboardInterrupt


def say(more: str = "") -> None:
    """Writes the line that everybody sees after Ctrl-C; safe within a handler."""
    with contextlib.suppress(OSError, ValueError):  # stderr is closed
        os.write(2, f"stopped by Ctrl-C{more}\n".encode())


class _Interrupt(KeyboardInterrupt):
    """Of a class in Python, so that its end can be watched."""


class _Handler:
    """Of SIGINT, within :func:`raised`.

    Attributes:
      asked: there was a Ctrl-C.
      active: the block has not ended.
    """

    def __init__(self) -> None:
        self.asked, self.active = False, True
        self._lost = False
        self._watch: weakref.ref | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked and not self._lost:
            _end()
        self.asked, self._lost = True, False
        interrupt = _Interrupt()
        self._watch = weakref.ref(interrupt, self._dropped)
        try:
            raise interrupt
        finally:
            del interrupt  # else its own traceback would keep it

    def _dropped(self, _: Any) -> None:
        """Nobody holds the exception any more, and it has not left the block."""
        if self.active:
            # A little later, when whoever dropped it is likely to be done.
            timer = threading.Timer(_AGAIN, self._again)
            timer.daemon = True
            timer.start()

    def _again(self) -> None:
        if self.active:
            self._lost = True
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)  # it may be waiting in a system call


def _is_ours() -> bool:
    """Whether Ctrl-C is this process's to handle: a shell lets a job in the background ignore it,
    and Python allows the main thread alone."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return not ignored and threading.current_thread() is threading.main_thread()


def _is_interrupt(lost: Any) -> bool:
    return isinstance(lost.exc_value, _Interrupt)


def _end(*_: Any) -> NoReturn:
    say()
    os._exit(STATUS)
