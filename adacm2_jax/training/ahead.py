"""Batches one step ahead: a thread reads them and starts their way to the device."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

#: Seconds between two looks at whether the device idles.
_ASKED = 0.005

Read = TypeVar("Read")
Put = TypeVar("Put")


class Ahead(Generic[Read, Put]):
    """An iterator over what a thread has read and put on the device; in the reader's order.

    While a step runs, one item is on the device or on its way there, and the thread reads one more
    into the host's memory. An item is put there when :meth:`start_next` says so: then the items on
    the device are that of the step that runs and that of the next, however far ahead the steps are
    dispatched.

    An error of the reader, its end included, is raised in the place of the item that it stands for.

    Args:
      items: the reader; used by the thread alone until :meth:`close` is over.
      put: starts an item's way to the device, and does not wait for its end.
      place: where the reader is; asked after each item, by the thread.

    Attributes:
      place: that of the reader after the item that was handed out last. What was only read ahead
        does not count.
    """

    def __init__(
        self,
        items: Iterator[Read],
        put: Callable[[Read], Put],
        place: Callable[[], Any] = lambda: None,
    ):
        self.place = place()
        self._items, self._put, self._place_of = items, put, place
        self._room = threading.Semaphore(1)
        self._holding = False  # whether the item that was handed out keeps its room
        self._made: queue.SimpleQueue = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._closed = False
        # A reader that hangs must not keep the process.
        self._thread = threading.Thread(target=self._run, name="batches ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Ahead[Read, Put]":
        return self

    def __next__(self) -> Put:
        return self.take()[0]

    def take(self, busy: Callable[[], bool] = lambda: True) -> tuple[Put, float]:
        """The next item, and for how long it was waited for while nothing was ``busy``, seconds.

        Args:
          busy: whether the device has something to do; asked every few milliseconds of a wait.
        """
        idle = 0.0
        if self._error is None:
            self.start_next()
            since = None if busy() else time.monotonic()
            while True:
                try:
                    # Once it idles there is nothing more to be asked.
                    made, place, self._error = self._made.get(timeout=_ASKED if not since else None)
                    break
                except queue.Empty:
                    since = None if busy() else time.monotonic()
            idle = time.monotonic() - since if since else 0.0
        if self._error is not None:
            raise self._error
        self.place, self._holding = place, True
        return made, idle

    def start_next(self) -> None:
        """Lets the next item be put on the device: the one before the newest is used up."""
        if self._holding:
            self._holding = False
            self._room.release()

    def close(self, timeout: float = 5.0) -> None:
        """Ends the thread, and lets go of what was not handed out.

        Args:
          timeout: seconds that a reader in the midst of an item is waited for. After that it is
            left alone, and may be closed.
        """
        self._closed = True
        self._error = self._error or ValueError("the batches are closed")
        self._room.release()
        self._thread.join(timeout)
        while not self._made.empty():
            self._made.get()

    def _run(self) -> None:
        try:
            while not self._closed:
                item = next(self._items)
                place = self._place_of()
                self._room.acquire()
                if self._closed:
                    return
                self._made.put((self._put(item), place, None))
                del item  # or its memory stays while the next one is read
        except BaseException as error:
            self._made.put((None, None, error))
