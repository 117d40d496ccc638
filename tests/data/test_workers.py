"""Decoding processes: they outlive a signal that their training process outlives, but not that.

Run as a script it is the training process.
"""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import grain
import numpy as np

from data.pipeline import training_batches

ROOT = pathlib.Path(__file__).resolve().parents[2]


def slow(index: int, _: np.random.Generator) -> dict:
    time.sleep(0.5)
    return {"index": np.int64(index), "question": "", "answer": ""}


def lives(process: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a zombie has ended, and nobody has asked how


def test_a_signal_to_the_whole_job_leaves_the_last_batch_and_a_kill_leaves_no_process():
    command = [sys.executable, "-m", "tests.data.test_workers"]
    training = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert training.stdout is not None
        workers = [int(word) for word in training.stdout.readline().split()]
        assert len(workers) == 2 and all(map(lives, workers))
        os.killpg(training.pid, signal.SIGTERM)
        assert training.stdout.readline() == "asked to stop, and read 8 more batches\n"
        assert all(map(lives, workers))
    finally:
        training.kill()
        training.communicate()
    deadline = time.monotonic() + 30
    while any(map(lives, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, workers))


def main() -> None:
    from absl import flags

    flags.FLAGS(sys.argv[:1])  # Grain's workers read flags
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    clips = grain.MapDataset.source(range(16)).seed(0).random_map(slow)
    batches = training_batches(clips, batch_size=1, seed=0, workers=2)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    while not asked:
        next(batches)
    for _ in range(8):
        next(batches)
    print("asked to stop, and read 8 more batches", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
