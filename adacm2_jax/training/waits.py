"""How long the device waits for data, and when people should be told."""

import sys
import time
from collections.abc import Callable

#: Seconds of training over which a share is taken.
_OVER = 60.0
#: Seconds until it is told again.
_AGAIN = 600.0
#: Share of the time from which on it is told.
_LEAST = 0.1


class Waits:
    """Counts the device's waits for data; tells of them where they are a good part of the time.

    Args:
      remedy: what to do about it.
      say: is given the line.
      clock: seconds.
    """

    def __init__(
        self,
        remedy: str,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
        clock: Callable[[], float] = time.monotonic,
    ):
        self._remedy, self._say, self._clock = remedy, say, clock
        self._told = float("-inf")
        self.pause()

    def pause(self) -> None:
        """What comes next is no training: neither is the time until the step after it."""
        self._since: float | None = None
        self._waited, self._steps = 0.0, 0

    def add(self, waited: float) -> None:
        """Before a step: for so many seconds the device had nothing to do but wait for its data."""
        now = self._clock()
        if self._since is None:  # the first batch is waited for in any case
            self._since = now
            return
        self._waited, self._steps = self._waited + waited, self._steps + 1
        passed = now - self._since
        if passed < _OVER:
            return
        share, each = self._waited / passed, self._waited / self._steps
        if share >= _LEAST and now - self._told >= _AGAIN:
            self._told = now
            self._say(
                f"warning: the device waited {share:.0%} of the last {passed:.0f} s for data "
                f"({each:.2g} s of {passed / self._steps:.2g} s a step): {self._remedy}"
            )
        self.pause()
        self._since = now
