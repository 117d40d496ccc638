"""Every example once an epoch: with any number of processes and workers, and across a resume.

Run as a script it prints the order that one process reads, because Grain's worker processes need a
main module of their own.
"""

import json
import pathlib
import subprocess
import sys

import grain
import numpy as np
import pytest

from adacm2_jax.errors import DataError
from data.pipeline import training_batches

ROOT = pathlib.Path(__file__).resolve().parents[2]
N, SEED = 53, 3  # a prime: nothing divides it


class Numbered:
    """A source whose clips are their numbers."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> int:
        return int(index)


def element(index: int, rng: np.random.Generator) -> dict:
    """With a draw of the kind that jitter makes."""
    return {"index": np.int64(index), "draw": rng.random(), "question": "", "answer": ""}


def rows(start: int, count: int, batch_size: int, world: int = 1, rank: int = 0, workers: int = 0):
    """(index, draw) of what one process reads in so many batches."""
    clips = grain.MapDataset.source(Numbered()).seed(0).random_map(element)
    batches = training_batches(
        clips, batch_size=batch_size, seed=SEED, workers=workers, rank=rank, world=world
    )
    batches.seek(start)
    read = [next(batches) for _ in range(count)]
    assert batches.examples == start + count * batch_size
    batches.close()
    pairs = [np.stack([batch["index"], batch["draw"]], axis=1) for batch in read]
    return np.concatenate(pairs).tolist()


def together(start: int, count: int, batch_size: int, world: int):
    """What all processes read, in the global order: row j of process r is row j · world + r."""
    shares = [rows(start, count, batch_size, world, rank) for rank in range(world)]
    assert {len(share) for share in shares} == {count * batch_size // world}
    return [pair for step in zip(*shares, strict=True) for pair in step]


def epochs(order) -> list[list[int]]:
    whole = [index for index, _ in order]
    return [whole[i : i + N] for i in range(0, len(whole) - N + 1, N)]


@pytest.fixture(scope="module")
def reference():
    return rows(0, 53 * 2, 8)


def test_one_process_sees_every_example_once_an_epoch_in_a_new_order_each_time(reference):
    found = epochs(reference)
    assert len(found) == 16 and all(sorted(epoch) == list(range(N)) for epoch in found)
    assert len({tuple(epoch) for epoch in found}) == 16
    assert len({draw for _, draw in reference}) == len(reference)  # an epoch's draws are its own


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [24, 48])
def test_processes_read_every_example_once_and_together_what_one_would(
    reference, world, batch_size
):
    order = together(0, len(reference) // batch_size, batch_size, world)
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs(order))
    assert order == reference[: len(order)]


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 3), (2, 1), (3, 2)])
def test_a_resume_with_another_number_of_processes_repeats_and_drops_nothing(
    reference, before, after
):
    first = together(0, 5, 24, before)  # stops within the third epoch
    rest = together(len(first), 12, 24, after)
    assert first + rest == reference[: 17 * 24]


def test_a_resume_with_another_batch_size_goes_on_with_the_next_example(reference):
    first, rest = rows(0, 7, 6), rows(42, 5, 11)
    assert first + rest == reference[: 42 + 55]


@pytest.mark.parametrize(("workers", "before", "after"), [(1, 1, 2), (4, 1, 1)])
def test_worker_processes_change_nothing_also_across_a_resume(reference, workers, before, after):
    """From the middle of an epoch, with another number of processes, each with its workers."""
    parts = []
    for world, start, count in ((before, 0, 5), (after, 120, 6)):
        shares = run([[start, count, 24, world, rank, workers] for rank in range(world)])
        parts += [pair for step in zip(*shares, strict=True) for pair in step]
    assert parts == reference[: 120 + 6 * 24]


def run(arguments: list) -> list:
    command = [sys.executable, "-m", "tests.data.test_epochs", json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(DataError, match="batch_size = 8 does not divide over 3 processes"):
        rows(0, 1, 8, world=3)


def main() -> None:
    from absl import flags

    flags.FLAGS(sys.argv[:1])  # Grain's workers read flags
    print(json.dumps([rows(*arguments) for arguments in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()
