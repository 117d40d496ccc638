"""What the training loop does between two steps, and in which order."""

import threading
import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from adacm2_jax.errors import UserError
from adacm2_jax.training.ahead import Ahead
from adacm2_jax.training.loop import Callbacks, Every, train

LAST = 6


class Run:
    """Notes what the loop does: ``events`` in order, as (what, step)."""

    def __init__(self, every: Every, signal_at: int = 0, bad: int = 0, lost: int = 0):
        self.events: list[tuple[str, int]] = []
        self._bad, self._lost, self._at, self._signal_at = bad, lost, 0, signal_at
        self.put = threading.Condition()
        self.batches = Ahead(self._read(), self._put, place=lambda: self._at)
        self.callbacks = Callbacks(
            begin_step=lambda step: None,
            log=lambda step, metrics: self.note("log", step),
            save=lambda state: self.note("save", state.step),
            check=lambda: None,
            wait=lambda: self.note("wait", 0),
            evaluate=lambda state: self.note("evaluate", state.step),
            newest=lambda: None,
            asked=lambda: self.note("asked", 0),
            polled=self._polled,
            stop=self._stop,
        )
        self._every = every

    def note(self, what: str, step: int) -> int:
        self.events.append((what, step))
        return 0

    def go(self) -> None:
        mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
        state = types.SimpleNamespace(step=0, frozen={}, learned={"a": np.ones(1)})
        try:
            train(
                state,
                self.batches,
                self._step,
                last=LAST,
                mesh=mesh,
                every=self._every,
                run=self.callbacks,
            )
        finally:
            self.batches.close()

    def on_device(self, number: int) -> bool:
        with self.put:
            return self.put.wait_for(lambda: self._newest >= number, 20)

    def _read(self):
        self._newest = 0
        while True:
            self._at += 1
            if self._at == self._lost:
                raise OSError("the reader is lost")
            yield self._at

    def _put(self, number: int) -> int:
        with self.put:
            self._newest = number
            self.put.notify_all()
        return number

    def _step(self, state, batch: int):
        step = state.step + 1
        assert batch == step and self.batches.place == step
        self.note("step", step)
        state = types.SimpleNamespace(step=step, frozen={}, learned=state.learned)
        loss = float("nan") if step == self._bad else 1.0
        return state, {"loss": Fetched(self, step, loss), "token_accuracy": np.float32(1)}

    def _polled(self) -> int:
        step = self.batches.place
        assert self.on_device(step + 1)  # while the step runs
        self.note("polled", step)
        return 15 if step == self._signal_at else 0

    def _stop(self, step: int, number: int) -> None:
        self.note("stop", step)
        raise SystemExit(128 + number)


class Fetched:
    """A loss that notes when the loop waits for it."""

    def __init__(self, run: Run, step: int, value: float):
        self._run, self._step, self._value = run, step, value

    def __array__(self, *_, **__) -> np.ndarray:
        self._run.note("fetch", self._step)
        return np.float32(self._value)

    def is_ready(self) -> bool:
        return True

    def block_until_ready(self) -> "Fetched":
        return self


def test_steps_that_stay_are_saved_too():
    every = Every(log=0, save=4, evaluate=0, keep=3)
    assert [step for step in range(1, 10) if every.due("save", step)] == [3, 4, 6, 8, 9]
    assert not any(every.due("evaluate", step) for step in range(1, 10))


def test_a_step_is_dispatched_before_the_one_before_is_fetched_and_nothing_lies_between():
    run = Run(Every(log=2, save=0, evaluate=0))
    run.go()
    expected = [("step", 1), ("polled", 1)]
    for step in range(2, LAST + 1):
        expected += [("step", step), ("fetch", step - 1)]
        if (step - 1) % 2 == 0:
            expected += [("log", step - 1)]
        expected += [("polled", step)]
    expected += [("fetch", LAST), ("log", LAST), ("save", LAST), ("wait", 0), ("asked", 0)]
    assert run.events == expected


def test_what_a_step_reports_is_known_before_it_is_saved_or_evaluated():
    run = Run(Every(log=0, save=3, evaluate=2))
    run.go()
    first = run.events.index
    assert first(("fetch", 3)) < first(("save", 3)) < first(("step", 4))
    saved = first(("save", 2))
    assert first(("fetch", 2)) < saved < first(("evaluate", 2)) < first(("step", 3))
    assert run.events[saved + 1 : saved + 3] == [("wait", 0), ("asked", 0)]


def test_a_signal_saves_the_step_that_runs_and_stops():
    run = Run(Every(log=0, save=0, evaluate=0), signal_at=3)
    with pytest.raises(SystemExit, match="143"):
        run.go()
    assert run.events[-4:] == [("polled", 3), ("fetch", 3), ("save", 3), ("stop", 3)]


def test_an_error_of_the_reader_comes_after_the_steps_and_saves_before_it():
    run = Run(Every(log=0, save=3, evaluate=0), lost=5)
    run.on_device = lambda number: True  # nothing comes after the fourth
    with pytest.raises(OSError, match="the reader is lost"):
        run.go()
    assert ("save", 3) in run.events and run.events[-1] == ("polled", 4)


def test_a_loss_that_is_not_finite_ends_the_run_before_its_state_is_saved():
    run = Run(Every(log=0, save=3, evaluate=0), bad=3)
    with pytest.raises(UserError, match="step 3: the loss is nan"):
        run.go()
    assert ("save", 3) not in run.events
