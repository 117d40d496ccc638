"""When people are told that the device waits for data, and in which figures."""

import threading
import time

import pytest

from adacm2_jax.training.ahead import Ahead
from adacm2_jax.training.waits import Waits


class Training:
    """Steps of simulated seconds."""

    def __init__(self):
        self.now, self.said = 0.0, []
        self.waits = Waits("buy a disk", self.said.append, lambda: self.now)

    def steps(self, count: int, waited: float, computed: float) -> None:
        for _ in range(count):
            self.now += waited
            self.waits.add(waited)
            self.now += computed


def test_a_loader_that_is_the_bottleneck_is_told_with_figures_and_remedy():
    training = Training()
    training.steps(200, waited=0.38, computed=0.62)
    assert training.said == [
        "warning: the device waited 38% of the last 60 s for data (0.38 s of 1 s a step): "
        "buy a disk"
    ]


def test_it_is_told_once_in_ten_minutes():
    training = Training()
    training.steps(3000, waited=0.5, computed=0.5)
    assert len(training.said) == 5  # at 60, 660, 1260, 1860 and 2460 s


@pytest.mark.parametrize(("waited", "computed"), [(0.0, 1.0), (0.09, 0.91)])
def test_a_loader_that_keeps_up_is_not_told_of(waited, computed):
    training = Training()
    training.steps(500, waited, computed)
    assert not training.said


def test_the_first_batch_and_what_is_no_training_do_not_count():
    training = Training()
    training.steps(1, waited=50, computed=1)  # the first batch, and compiling
    training.steps(100, waited=0.0, computed=1.0)
    training.waits.pause()
    training.now += 500  # an evaluation
    training.steps(1, waited=30, computed=1)
    training.steps(100, waited=0.0, computed=1.0)
    assert not training.said


def slow(seconds: float):
    while True:
        time.sleep(seconds)
        yield 1


def test_only_a_wait_in_which_the_device_idles_counts():
    """A step of 0.3 s, and data that takes 1 s: the device idles for the rest."""
    batches = Ahead(slow(1.0), lambda item: item)
    try:
        batches.take()
        done = time.monotonic() + 0.3
        started = time.monotonic()
        _, idle = batches.take(lambda: time.monotonic() < done)
        waited = time.monotonic() - started
        assert abs(idle - (waited - 0.3)) < 0.25 and waited > 0.3
        _, idle = batches.take(lambda: True)
        assert idle == 0.0
    finally:
        batches.close()


def test_what_is_there_already_was_not_waited_for():
    put = threading.Event()
    batches = Ahead(iter(range(5)), lambda item: put.set() or item)
    try:
        assert put.wait(20)
        time.sleep(0.1)
        item, idle = batches.take(lambda: False)
        assert item == 0 and idle < 0.05
    finally:
        batches.close()
