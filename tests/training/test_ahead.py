"""Batches that a thread reads and puts on the device ahead of the steps."""

import itertools
import threading

import pytest

from adacm2_jax.training.ahead import Ahead

#: Seconds in which a thread has long done what it is going to do.
SOON = 20


class Reader:
    """Numbers from 1; ``read`` is the newest, ``wait_for`` waits until one is read."""

    def __init__(self, last: int | None = None, error: Exception | None = None):
        self.read, self._last, self._error = 0, last, error
        self._changed = threading.Condition()

    def __iter__(self):
        return self

    def __next__(self) -> int:
        with self._changed:
            if self.read == self._last:
                raise self._error or StopIteration
            self.read += 1
            self._changed.notify_all()
            return self.read

    def wait_for(self, number: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.read >= number, SOON)


class Device:
    """What has been put."""

    def __init__(self):
        self.items, self._changed = [], threading.Condition()

    def put(self, item: int) -> str:
        with self._changed:
            self.items.append(item)
            self._changed.notify_all()
        return f"on the device: {item}"

    def wait_for(self, item: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: item in self.items, SOON)


@pytest.fixture
def ahead():
    made = []

    def make(*arguments, **options) -> Ahead:
        made.append(Ahead(*arguments, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_the_next_is_on_the_device_and_one_more_read_before_it_is_asked_for(ahead):
    reader, device = Reader(), Device()
    batches = ahead(reader, device.put)
    assert next(batches) == "on the device: 1"
    # The step that the first is for is dispatched, but the one before may still run.
    assert reader.wait_for(2) and device.items == [1]
    batches.start_next()
    assert device.wait_for(2) and reader.wait_for(3)
    assert device.items == [1, 2] and reader.read == 3  # and no further
    assert next(batches) == "on the device: 2"


def test_without_being_told_it_goes_on_by_itself_in_the_order_of_the_reader(ahead):
    batches = ahead(Reader(last=50), lambda item: item)
    assert list(batches) == [*range(1, 51)]


def test_the_place_counts_what_was_handed_out_not_what_was_read_ahead(ahead):
    reader, device = Reader(), Device()
    batches = ahead(reader, device.put, place=lambda: 8 * reader.read)
    for number in (1, 2, 3):
        next(batches)
        batches.start_next()
        assert device.wait_for(number + 1) and reader.wait_for(number + 2)
        assert batches.place == 8 * number


def test_before_the_first_the_place_is_where_the_reader_was(ahead):
    places = itertools.count(40, 8)
    assert ahead(Reader(), lambda item: item, place=lambda: next(places)).place == 40


@pytest.mark.parametrize("error", [None, OSError("a disk is gone")])
def test_an_error_comes_after_what_was_read_before_it_and_stays(ahead, error):
    batches = ahead(Reader(last=2, error=error), lambda item: item)
    assert [next(batches), next(batches)] == [1, 2]
    for _ in range(2):
        with pytest.raises(type(error) if error else StopIteration) as raised:
            next(batches)
        assert error is None or raised.value is error


def test_what_cannot_be_put_is_an_error_at_its_place(ahead):
    def put(item: int) -> int:
        if item == 2:
            raise MemoryError("no room on the device")
        return item

    batches = ahead(Reader(), put)
    assert next(batches) == 1
    with pytest.raises(MemoryError, match="no room on the device"):
        next(batches)


def test_closed_it_has_no_thread_and_gives_nothing(ahead):
    before = threading.active_count()
    reader, device = Reader(), Device()
    batches = ahead(reader, device.put)
    next(batches)
    assert reader.wait_for(2) and threading.active_count() == before + 1  # it waits for room
    batches.close()
    batches.close()
    assert threading.active_count() == before and device.items == [1]
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_a_reader_that_hangs_does_not_hold_up_the_end(ahead):
    hangs, go_on = threading.Event(), threading.Event()

    def read():
        hangs.set()
        go_on.wait()
        yield 1

    batches = ahead(read(), lambda item: item)
    assert hangs.wait(SOON)
    batches.close(timeout=0.05)
    go_on.set()
