"""How long does the device wait for the host in the training loop, now and before?

    python benchmarks/training_loop.py [--step 0.05] [--steps 32] [--rounds 5] [--json out.json]

The loop is that of training; the device is a thread that takes a fixed time a step and none of the
CPU, one step after the other, as a GPU or TPU does. Reading a batch takes a given share of a step:
always the same, or now and then longer than a step. The batch is put on JAX's device. The other
side is the former loop: read, put, dispatch, fetch what the step before reports, one after the
other in one thread; several processes agreed after every step on whether to stop, by a collective
that comes after the step. The share of waiting is that of the time from the first step's beginning
to the last one's end in which the device has no step.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator

import _paired  # before JAX: it sets the number of threads
import _report
import jax
import numpy as np
from _device import Device, Reported, State, callbacks

from adacm2_jax.distributed import steps_between
from adacm2_jax.sharding import make_mesh, shard_batch
from adacm2_jax.training.ahead import Ahead
from adacm2_jax.training.loop import Every, train

#: Eight clips of sixteen frames: 19 MB.
SHAPE = (8, 16, 224, 224, 3)
#: Seconds that writing to the log takes.
LOG = 1e-3
#: Name → the times of reading that follow each other again and again, in steps.
READERS = {
    "half a step": (0.5,),
    "0.9 of a step": (0.9,),
    "0.5, every eighth 2": (0.5,) * 7 + (2.0,),
    "0.2, every eighth 3": (0.2,) * 7 + (3.0,),
}


def read(times: tuple[float, ...], rows: np.ndarray) -> Iterator[np.ndarray]:
    for seconds in itertools.cycle(times):
        time.sleep(seconds)
        yield rows


def former_loop(
    batches: Iterator, train_step: Callable, last: int, asked: Callable[[State], None]
) -> None:
    """What the loop did between two steps, without saving and evaluating."""
    state, pending = State(0), []
    for step in range(1, last + 1):
        batch = next(batches)
        state, metrics = train_step(state, batch)
        if step == 1:
            jax.block_until_ready(metrics)
        if pending:
            jax.device_get(pending.pop())
            time.sleep(LOG)
        pending.append(metrics)
        asked(state)
    jax.device_get(pending.pop())


def run(reader: str, several: bool, seconds: float, steps: int, rounds: int) -> dict:
    """Both loops in turn with one reader.

    Args:
      reader: of ``READERS``.
      several: whether there are more processes to agree with.
      seconds: of a step.
      steps, rounds: of a loop, and how often each is run.
    """
    device, mesh = Device(seconds), make_mesh((1, 1))
    rows = np.zeros(SHAPE, np.uint8)
    times = tuple(share * seconds for share in READERS[reader])
    waited: dict[str, list[float]] = {"ours": [], "theirs": []}

    def put(rows: np.ndarray) -> jax.Array:
        return shard_batch(rows, mesh)

    def train_step(state: State, batch: jax.Array) -> tuple[State, dict]:
        done = device.dispatch(batch)
        metrics = {"loss": Reported(done), "token_accuracy": np.float32(1)}
        return State(state.step + 1, done), metrics

    def agree(state: State, every: int) -> int:
        """A collective is there when the step before it is done."""
        if several and state.step % every == 0:
            state.done.wait()
        return 0

    def ours() -> None:
        newest = State(0)
        batches = Ahead(read(times, rows), put)

        def step(state: State, batch: jax.Array) -> tuple[State, dict]:
            nonlocal newest
            newest, metrics = train_step(state, batch)
            return newest, metrics

        every = Every(log=1, save=0, evaluate=0)
        given = callbacks(
            log=lambda step, metrics: time.sleep(LOG),
            polled=lambda: agree(newest, steps_between(seconds)),
        )
        train(State(0), batches, step, last=steps, mesh=mesh, every=every, run=given)
        batches.close()
        waited["ours"].append(device.waited())

    def theirs() -> None:
        batches = map(put, read(times, rows))
        former_loop(batches, train_step, steps, lambda state: agree(state, 1))
        waited["theirs"].append(device.waited())

    row = _paired.paired(ours, theirs, rounds)
    device.close()
    shares = {f"{side}_waited": float(np.median(values)) for side, values in waited.items()}
    return row | shares | dict(reader=reader, several=several, step=seconds, steps=steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--step", type=float, default=0.05, help="seconds of a step on the device")
    parser.add_argument("--steps", type=int, default=32, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    results = _paired.header()
    print(f"a step takes {1e3 * args.step:.0f} ms, of which the device waits for the host:")
    print(f"{'reading a batch':22} {'processes':10} {'now':>7} {'before':>7}  before : now")
    for several, reader in itertools.product((False, True), READERS):
        row = run(reader, several, args.step, args.steps, args.rounds)
        results["rows"].append(row)
        processes = "several" if several else "one"
        print(
            f"{reader:22} {processes:10} {row['ours_waited']:7.1%} {row['theirs_waited']:7.1%}  "
            f"{_report.ratio(row)}",
            flush=True,
        )
    _report.write_json(args.json, results)


if __name__ == "__main__":
    main()
