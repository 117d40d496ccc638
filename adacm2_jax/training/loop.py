"""The training loop: evaluate, step, fetch what the step before reports, log, save.

The device has the next step before it is done with one, and the next batch before it is done with
the step before: batches come from a thread (ahead.py). Between two steps the host waits for the
device alone, but where a checkpoint leaves it, where several processes agree on whether to stop
(:class:`adacm2_jax.distributed.Preemption`), and after the first step, which compiles.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from adacm2_jax.errors import UserError
from adacm2_jax.progress import Progress, compiling
from adacm2_jax.training.ahead import Ahead
from adacm2_jax.training.step import Batch, TrainState, explain_nonfinite
from adacm2_jax.training.waits import Waits


@dataclasses.dataclass(frozen=True)
class Every:
    """Steps between two of a kind; 0: never before the last step."""

    log: int
    save: int
    evaluate: int
    #: Saved as well, to stay.
    keep: int = 0

    def due(self, kind: str, step: int) -> bool:
        """Whether ``step`` is one of them."""
        numbers = (self.save, self.keep) if kind == "save" else (getattr(self, kind),)
        return any(every and step % every == 0 for every in numbers)


@dataclasses.dataclass(frozen=True)
class Callbacks:
    """What the loop calls for the run around it; an error of any ends the loop.

    Attributes:
      begin_step: before a step, with its number.
      log: metrics of a step, as floats.
      save: the state; in the background.
      check: raises what a save in the background has run into; does not wait.
      wait: until all that is being saved is complete.
      evaluate: the state.
      newest: the newest step that is saved, or None.
      asked: the signal that asks to stop, 0 if there is none; the same in every process.
      polled: the same after a step, soon after it is asked for.
      stop: ends the run after a step, for a signal; does not return.
    """

    begin_step: Callable[[int], None]
    log: Callable[[int, dict], None]
    save: Callable[[TrainState], None]
    check: Callable[[], None]
    wait: Callable[[], None]
    evaluate: Callable[[TrainState], Any]
    newest: Callable[[], int | None]
    asked: Callable[[], int]
    polled: Callable[[], int]
    stop: Callable[[int, int], None]


def train(
    state: TrainState,
    batches: Ahead[Any, Batch],
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict]],
    *,
    last: int,
    mesh: Mesh,
    every: Every,
    run: Callbacks,
    waits: Waits | None = None,
) -> TrainState:
    """Takes the steps up to ``last`` and returns the state after it, saved.

    What a step reports is fetched when the next one is on its way, so that the device does not wait
    for the host; it is fetched before anything is saved.

    Args:
      state: it goes on from.
      batches: endless, put on the mesh.
      train_step: of ``make_train_step``.
      last: the run's last step.
      mesh: of the state.
      every: how often.
      run: what is called.
      waits: is told how long the device waits for its data.

    Raises:
      UserError: at the first loss or gradient that is not finite.
    """
    first = int(state.step) + 1
    pending: list[tuple[int, dict]] = []
    progress = Progress("train", total=last, initial=first - 1, unit="steps")

    waits = waits or Waits("read it faster")

    def running() -> bool:
        """Whether the device has a step to do."""
        return bool(pending) and not pending[-1][1]["loss"].is_ready()

    def settle() -> None:
        """Fetches what the newest step has reported."""
        while pending:
            step, metrics = pending.pop(0)
            metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if reason := explain_nonfinite(state, metrics):
                raise UserError(
                    f"step {step}: {reason}. Lower optim.learning_rate or optim.clip_norm, or look "
                    f"at init_from; the newest checkpoint is {run.newest()}"
                )
            progress.update(1, loss=metrics["loss"], accuracy=metrics["token_accuracy"])
            if every.due("log", step) or step == last:
                run.log(step, metrics)

    def stop_if_asked(step: int) -> None:
        run.wait()  # which may take long
        if number := run.asked():
            run.stop(step, number)

    with progress:
        for step in range(first, last + 1):
            run.begin_step(step)
            # Before the step after it, so that a resumed run makes up for a missed one.
            if step > 1 and every.due("evaluate", step - 1):
                settle()
                run.save(state)
                stop_if_asked(step - 1)
                run.evaluate(state)
                waits.pause()
            batch, idle = batches.take(running)
            waits.add(idle)
            with jax.set_mesh(mesh), _said(step == first):
                state, metrics = train_step(state, batch)
                del batch  # the loop must not keep on the device what the step is done with
                if step == first or _must_wait(mesh):
                    jax.block_until_ready(metrics)
            settle()
            batches.start_next()  # the step before is over, and its batch no longer there
            pending.append((step, metrics))
            run.check()
            asked = run.polled()
            if every.due("save", step) or step == last or asked:
                settle()
                run.save(state)
            if asked:
                run.stop(step, asked)
        stop_if_asked(last)
    return state


def _said(first: bool) -> contextlib.AbstractContextManager:
    return compiling("the training step") if first else contextlib.nullcontext()


def _must_wait(mesh: Mesh) -> bool:
    """Devices that share the host's cores wait for each other for ever if steps overlap."""
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
