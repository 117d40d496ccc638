"""What the benchmarks share: paired timing of two programs, and the machine's peak."""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# The scripts run from a checkout in which nothing is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# JAX reads its number of threads from NPROC, once, when it is imported.
THREADS = int(os.environ.setdefault("NPROC", "2"))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from _report import machine  # noqa: E402

try:
    import torch
except ImportError:
    raise SystemExit(
        "error: the benchmarks compare with PyTorch, which is not installed; "
        "run `make test` once on Python 3.11 or `pip install torch`"
    ) from None

torch.set_num_threads(THREADS)
# The CPU time of a single thread hardly depends on what else the machine does.
CLOCK = time.process_time if THREADS == 1 else time.perf_counter
PEAK_SIZE = 2048


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    start = CLOCK()
    run()
    return CLOCK() - start


def paired(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict:
    """Times two programs in turn, so that whatever else the machine does falls on both.

    Returns:
      ``ours`` and ``theirs``, the medians in seconds; ``ratio``, the median of theirs / ours taken
      round by round; ``low`` and ``high``, the quartiles of that ratio.
    """
    ours(), theirs()
    pairs = []
    for turn in range(rounds):
        if turn % 2:
            late, early = seconds(theirs), seconds(ours)
            pairs.append((early, late))
        else:
            pairs.append((seconds(ours), seconds(theirs)))
    ratios = [b / a for a, b in pairs]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return dict(
        ours=statistics.median(a for a, _ in pairs),
        theirs=statistics.median(b for _, b in pairs),
        ratio=ratio,
        low=low,
        high=high,
    )


def peak(rounds: int = 8) -> dict:
    """GFLOP/s of a square float32 matrix product in each framework (the best of some rounds)."""
    a = np.random.default_rng(0).standard_normal((PEAK_SIZE, PEAK_SIZE), np.float32)
    x, y = jnp.asarray(a), torch.from_numpy(a)
    multiply = jax.jit(jnp.matmul)
    runs = dict(jax=lambda: multiply(x, x).block_until_ready(), torch=lambda: y @ y)
    best = {name: float("inf") for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            best[name] = min(best[name], seconds(run))
    return {name: 2 * PEAK_SIZE**3 / 1e9 / time for name, time in best.items()}


def header() -> dict:
    """Measures and prints what every benchmark begins with; its rows are to be filled in."""
    results = dict(
        machine=machine() | dict(threads=THREADS, clock=CLOCK.__name__), peak=peak(), rows=[]
    )
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    print("matmul peak: {jax:.0f} GFLOP/s (jax), {torch:.0f} (torch)".format(**results["peak"]))
    return results


def shares(row: dict, peaks: dict) -> str:
    """How much of the peak each side reaches, for the table; ``gflop`` is that of a frame."""
    ours = row["gflop"] / row["ours"] / peaks["jax"]
    theirs = row["gflop"] / row["theirs"] / peaks["torch"]
    return f"ours {ours:4.0%}, torch {theirs:4.0%}"
