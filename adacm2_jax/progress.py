"""How far long work has come, with the time left: a bar on a terminal, else a line now and then."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

#: Seconds between two lines where there is no terminal.
EVERY = 15.0


class Progress:
    """Counts what is done. Nothing is said of the time left before the second step: the first one
    compiles.

    Args:
      what: is done, such as ``train``.
      total: of the units; 0 if nobody knows.
      initial: units that are done already.
      unit: their name, in the plural.
      shown: whether this process shows anything.
      stream: by default stderr.
      every: seconds between two lines where the stream is no terminal.
    """

    def __init__(
        self,
        what: str,
        total: int = 0,
        *,
        initial: int = 0,
        unit: str = "steps",
        shown: bool = True,
        stream: TextIO | None = None,
        every: float = EVERY,
    ):
        self._what, self._total, self._unit = what, total, unit
        self._done = self._initial = initial
        self._shown, self._stream, self._every = shown, stream or sys.stderr, every
        self._updates = 0
        self._begun = self._said = time.monotonic()
        self._first_end, self._first_done = self._begun, initial
        self._bar = None
        if shown and self._stream.isatty():
            self._bar = self._make_bar()

    def _make_bar(self) -> Any:
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}{postfix}]"
        return tqdm(
            desc=self._what,
            total=self._total or None,
            initial=self._initial,
            unit=self._unit,
            file=self._stream,
            bar_format=layout if self._total else None,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def update(self, count: int = 1, **figures: float) -> None:
        """Notes that ``count`` more units are done.

        Args:
          count: of units.
          figures: to be shown beside, such as the loss.
        """
        now = time.monotonic()
        self._done += count
        self._updates += 1
        if self._updates == 1:
            self._first_end, self._first_done = now, self._done
        if self._bar is not None:
            left = self._left(now)
            text = [f"{name} {value:.3g}" for name, value in figures.items()]
            text += [f"{left} left"] if left else []
            self._bar.set_postfix_str(", ".join(text), refresh=False)
            self._bar.update(count)
        elif self._shown and now - self._said >= self._every:
            self._said = now
            self._say(now, figures)

    def close(self) -> None:
        """Ends the bar, and says in a last line how long it took, if lines were written before."""
        if self._bar is not None:
            self._bar.close()
        elif self._shown and self._said > self._begun:
            seconds = time.monotonic() - self._begun
            self._print(f"{self._what} {self._count()}, {duration(seconds)} in all")
        self._shown = False

    def _say(self, now: float, figures: dict[str, float]) -> None:
        parts = [f"{self._what} {self._count()}"]
        parts += [f"{name} {value:.3g}" for name, value in figures.items()]
        if left := self._left(now):
            parts.append(f"{left} left")
        self._print(", ".join(parts))

    def _count(self) -> str:
        of = f"/{self._total}" if self._total else ""
        return f"{self._done}{of} {self._unit}"

    def _left(self, now: float) -> str:
        done = self._done - self._first_done
        if not self._total or self._updates < 2 or done <= 0:
            return ""
        seconds = (now - self._first_end) / done * max(self._total - self._done, 0)
        return duration(seconds)

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """Such as ``42 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@contextlib.contextmanager
def compiling(what: str, shown: bool = True) -> Iterator[None]:
    """Says in one line on stderr that something is being compiled, and how long it took."""
    if not shown:
        yield
        return
    with patience(f"compiling {what}", after=0):
        yield


@contextlib.contextmanager
def patience(what: str, after: float = 2.0) -> Iterator[None]:
    """Says in one line on stderr what is being done, and how long it took, where it takes longer.

    Args:
      what: is done, such as ``loading the model``.
      after: seconds; what is done by then is not spoken of.
    """
    begun, said = time.monotonic(), threading.Event()

    def say() -> None:
        print(f"{what} …", end="", file=sys.stderr, flush=True)
        said.set()

    timer = threading.Timer(after, say)
    timer.daemon = True
    if after:
        timer.start()
    else:
        say()
    took = "stopped"
    try:
        yield
        took = f"{time.monotonic() - begun:.1f} s"
    finally:
        timer.cancel()
        if after:
            timer.join()
        if said.is_set():
            print(f" {took}", file=sys.stderr, flush=True)
