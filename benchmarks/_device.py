"""A device that takes a fixed time a step and none of the CPU, as a GPU or TPU does."""

import queue
import threading
import time
from collections.abc import Callable

import jax
import numpy as np

from adacm2_jax.training.loop import Callbacks


class Device:
    """Takes steps one after the other, and knows for how long it had one."""

    def __init__(self, seconds: float):
        self._seconds, self._queue = seconds, queue.SimpleQueue()
        self._begun, self._end, self._busy = 0.0, 0.0, 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def dispatch(self, batch: jax.Array | None) -> threading.Event:
        done = threading.Event()
        self._queue.put((batch, done))
        return done

    def waited(self) -> float:
        """The share of time without a step, since it was last asked."""
        share = 1 - self._busy / (self._end - self._begun)
        self._begun = self._busy = 0.0
        return share

    def close(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            batch, done = item
            jax.block_until_ready(batch)
            begun = time.perf_counter()
            time.sleep(self._seconds)
            self._end = time.perf_counter()
            self._begun = self._begun or begun
            self._busy += self._end - begun
            done.set()


class Reported:
    """A metric that is there when the step is done."""

    def __init__(self, done: threading.Event):
        self._done = done

    def is_ready(self) -> bool:
        return self._done.is_set()

    def __array__(self, *_, **__) -> np.ndarray:
        self._done.wait()
        return np.float32(1)

    def block_until_ready(self) -> "Reported":
        self._done.wait()
        return self


class State:
    """Stands for a train state."""

    def __init__(self, step: int, done: threading.Event | None = None):
        self.step, self.done = step, done


def callbacks(log: Callable, polled: Callable[[], int]) -> Callbacks:
    """Of a loop around which there is no run."""
    return Callbacks(
        begin_step=lambda step: None,
        log=log,
        save=lambda state: None,
        check=lambda: None,
        wait=lambda: None,
        evaluate=lambda state: None,
        newest=lambda: None,
        asked=lambda: 0,
        polled=polled,
        stop=lambda step, number: None,
    )
