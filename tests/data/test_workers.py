"""Decoding processes: they outlive a signal that their training process outlives, but not that.

Run as a script it is the training process.
"""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import grain
import numpy as np

from adacm2_jax.errors import UserError
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


def test_a_signal_to_the_whole_job_leaves_the_next_batches_and_a_kill_leaves_no_process():
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


def test_a_decoding_process_that_is_killed_is_told_in_one_line():
    command = [sys.executable, "-m", "tests.data.test_workers", "kill"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=90)
    killed, full = done.stdout.splitlines()
    assert killed.startswith("a decoding process was ended by SIGKILL (memory that runs out is")
    # What writing to a full /dev/shm ends in.
    assert full.startswith("no room in the shared memory /dev/shm, through which decoding")
    assert "data.workers=2" in killed and "data.workers=2" in full
    assert done.returncode == 0, done.stderr


def kill_one(number: int) -> None:
    """Kills a decoding process and prints what its reader then says."""
    clips = grain.MapDataset.source(range(16)).seed(0).random_map(slow)
    batches = training_batches(clips, batch_size=1, seed=0, workers=2)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, number)
    try:
        for _ in range(20):
            next(batches)
    except UserError as error:
        print(error, flush=True)
    batches.close()


def tell_children() -> None:
    """Prints the decoding processes as soon as both are there, long before they decode."""
    while len(children := multiprocessing.active_children()) < 2:
        time.sleep(0.001)
    print(*[child.pid for child in children], flush=True)


def main() -> None:
    from absl import flags

    flags.FLAGS(sys.argv[:1])  # Grain's workers read flags
    if sys.argv[1:]:
        kill_one(signal.SIGKILL)
        kill_one(signal.SIGBUS)
        os._exit(0)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    clips = grain.MapDataset.source(range(16)).seed(0).random_map(slow)
    batches = training_batches(clips, batch_size=1, seed=0, workers=2)
    threading.Thread(target=tell_children, daemon=True).start()
    while not asked:
        next(batches)
    for _ in range(8):
        next(batches)
    print("asked to stop, and read 8 more batches", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
