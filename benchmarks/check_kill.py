"""Does a run that is killed again and again end in the very same parameters? ``make check-kill``

Trains once without interruption and once with SIGKILL and SIGTERM at random steps, each time going
on with the same command, and compares the last checkpoints bit by bit: parameters, optimiser and
data iterator. Prints a table; exits with 1 if anything differs.
"""

import argparse
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).resolve().parent.parent
OVERRIDES = {
    "data.needle.train_size": 200,
    "data.needle.test_size": 20,
    "train.batch_size": 8,
    "train.log_every": 1,
    "checkpoint.every": 5,
    "eval.batch_size": 10,
}


def start(command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Starts a command of the repository; its output is kept."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def signal_at_step(
    process: subprocess.Popen, workdir: pathlib.Path, step: int, number: int, timeout: float = 600
) -> int:
    """Sends a signal once this process has logged ``step``; returns its exit status."""
    rows, deadline = workdir / "metrics.jsonl", time.monotonic() + timeout
    logged = re.compile(rf'^{{"step": {step}, "(?!eval)', re.MULTILINE)
    # A resumed run puts a new file in place of the one that the process before it left.
    left = rows.stat().st_ino if rows.exists() else None
    while not (rows.exists() and rows.stat().st_ino != left and logged.search(rows.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"no step {step}: {process.communicate()[0]}")
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate(timeout=timeout)
    return process.returncode


def leaves(tree) -> dict[str, tuple]:
    """Every array of a tree by its path: type, shape and bytes."""
    arrays = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()}


def differences(first: pathlib.Path, second: pathlib.Path) -> list[str]:
    """What is not the same, bit by bit, in the newest checkpoints of two runs."""
    steps = [
        max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
        for run in (first, second)
    ]
    if steps[0] != steps[1]:
        return [f"newest step: {steps[0]} and {steps[1]}"]
    found = []
    with ocp.StandardCheckpointer() as checkpointer:
        for part in ("learned", "optimizer"):
            one, other = (
                leaves(checkpointer.restore(run.absolute() / "checkpoints" / str(steps[0]) / part))
                for run in (first, second)
            )
            found += [f"{part}: {name} is in one alone" for name in one.keys() ^ other.keys()]
            found += [
                f"{part}: {name}" for name in one.keys() & other.keys() if one[name] != other[name]
            ]
    data = [
        {
            path.name: path.read_bytes()
            for path in sorted((run / "checkpoints" / str(steps[0]) / "data").rglob("*.json"))
        }
        for run in (first, second)
    ]
    return found + (["data: the iterator's place"] if data[0] != data[1] or not data[0] else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=6, help="signals in all (default: 6)")
    parser.add_argument("--steps", type=int, default=60, help="training steps (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the random steps")
    parser.add_argument("--config", default="configs/needle.py:first")
    parser.add_argument(
        "overrides", nargs="*", help="for train.py, such as --config.seed=1, after --"
    )
    args = parser.parse_args()
    if not 0 < args.kills < args.steps:
        parser.error(
            f"--kills {args.kills}: must be 1 or more, and fewer than --steps {args.steps}"
        )
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))

    with tempfile.TemporaryDirectory() as scratch:
        base = pathlib.Path(scratch)
        values = OVERRIDES | {"train.steps": args.steps}
        values |= {"data.data_dir": base / "data", "data.cache_dir": base / "cache"}

        def command(workdir: pathlib.Path) -> list[str]:
            given = [f"--config.{name}={value}" for name, value in values.items()]
            recipe = [f"--config={args.config}", f"--workdir={workdir}"]
            return [sys.executable, "train.py", *recipe, *given, *args.overrides]

        print(f"{args.steps} steps without interruption", flush=True)
        whole = start(command(base / "whole"))
        output = whole.communicate()[0]
        if whole.returncode:
            print(output)
            return 1
        killed = base / "killed"
        steps = sorted(random.Random(args.seed).sample(range(1, args.steps), args.kills))
        print(f"{'step':>5}  {'signal':8} {'exit':>5}  {'seconds':>7}  newest checkpoint")
        for turn, step in enumerate(steps):
            number = (signal.SIGKILL, signal.SIGTERM)[turn % 2]
            began = time.perf_counter()
            status = signal_at_step(start(command(killed)), killed, step, number)
            saved = [int(p.name) for p in (killed / "checkpoints").iterdir() if p.name.isdigit()]
            seconds = time.perf_counter() - began
            newest = max(saved, default="none")
            print(f"{step:5}  {number.name:8} {status:5}  {seconds:7.1f}  {newest}", flush=True)
        last = start(command(killed))
        output = last.communicate()[0]
        if last.returncode:
            print(output)
            return 1
        found = differences(base / "whole", killed)
    print("\n".join(found) or f"bitwise equal after {args.steps} steps and {args.kills} signals")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
