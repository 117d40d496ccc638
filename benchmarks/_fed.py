"""One side of ``fed_host.py``: the training loop of the checkout in which it is started, fed from a
cache of features, beside a device that takes a fixed time a step.

Reads a measurement a line from stdin, as JSON, and answers each with a line: ``waited``, the share
of time in which the device had no step, and ``memory``, the most that the process held, bytes.
"""

import inspect
import json
import os
import pathlib
import resource
import sys

sys.path.insert(0, os.getcwd())

import _loader
import jax
from _device import Device, Reported, State, callbacks

from adacm2_jax.sharding import make_mesh, shard_batch
from adacm2_jax.training.ahead import Ahead
from adacm2_jax.training.loop import Every, train
from data.pipeline import training_batches


def fed(
    directory: str, dtype: str, count: int, frames: int, batch: int, seconds: float, steps: int
) -> float:
    """The share of waiting over ``steps`` steps of ``seconds``."""
    opened = _loader.feature_set(directory, dtype, count, frames)
    newer = "ahead" in inspect.signature(training_batches).parameters
    more = {"ahead": 2} if newer else {}  # as train.py has it
    rows = training_batches(opened, batch_size=batch, seed=0, **more)
    device, mesh = Device(seconds), make_mesh((1, 1))

    def step(state: State, rows: jax.Array) -> tuple[State, dict]:
        done = device.dispatch(rows)
        return State(state.step + 1, done), {"loss": Reported(done), "token_accuracy": 1.0}

    batches = Ahead((each["frames"] for each in rows), lambda frames: shard_batch(frames, mesh))
    every = Every(log=steps, save=0, evaluate=0)
    run = callbacks(log=lambda step, metrics: None, polled=lambda: 0)
    train(State(0), batches, step, last=steps, mesh=mesh, every=every, run=run)
    batches.close()
    rows.close()
    device.close()
    return device.waited()


def main() -> None:
    for line in sys.stdin:
        given = json.loads(line)
        given["directory"] = str(pathlib.Path(given["directory"]) / str(os.getpid()))
        waited = fed(**given)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(dict(waited=waited, memory=memory)), flush=True)


if __name__ == "__main__":
    main()
