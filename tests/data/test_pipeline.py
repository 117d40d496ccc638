"""Training batches: complete, shuffled by the seed alone, resumable, and tolerant of bad videos."""

import logging

import numpy as np
import pytest

from adacm2_jax.errors import DataError
from adacm2_jax.video.frames import Sampling
from adacm2_jax.video.resize import RESIZES
from data.jsonl import Example
from data.pipeline import LoadClip, clips, stack, training_batches
from tests.video.make_videos import encode, numbered_frames, read_numbers


class Videos(list):
    def __repr__(self) -> str:
        return "Videos"


@pytest.fixture(scope="module")
def source() -> Videos:
    return Videos(
        Example(str(n), encode(None, numbered_frames(8 + n), fps=8), f"q{n}", str(n), None, None)
        for n in range(10)
    )


def load(frames=4, jitter=False, **sampling) -> LoadClip:
    return LoadClip(
        Sampling(**({"mode": "uniform", "num_frames": frames} | sampling)),
        frames,
        32,
        jitter,
        "error",
    )


def take(source, count, seed=0, clip=None, batch_size=3, **options) -> list[dict]:
    batches = training_batches(
        clips(source, clip or load()), batch_size=batch_size, seed=seed, **options
    )
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def order(batches) -> list[int]:
    return [int(i) for batch in batches for i in batch["index"]]


def equal(one: list[dict], other: list[dict]) -> bool:
    return all(np.array_equal(a[key], b[key]) for a, b in zip(one, other, strict=True) for key in a)


def test_a_batch_has_frames_texts_and_places(source):
    (batch,) = take(source, 1)
    assert batch["frames"].shape == (3, 4, 32, 32, 3) and batch["frames"].dtype == np.uint8
    assert batch["valid"].all() and batch["valid"].shape == (3, 4)
    assert batch["index"].dtype == np.uint32
    for i, place in enumerate(batch["index"]):
        assert batch["question"][i] == f"q{place}" and batch["answer"][i] == str(place)
        length = 8 + int(place)
        expected = [int((k + 0.5) / 4 * length) for k in range(4)]
        assert read_numbers(batch["frames"][i]) == expected


def test_every_epoch_has_every_example_once_in_an_order_of_its_own(source):
    places = order(take(source, 20, batch_size=2))
    epochs = [places[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_alone_decides(source):
    clip = load(jitter=True)
    assert equal(take(source, 7, clip=clip), take(source, 7, clip=clip))
    assert order(take(source, 4, seed=1)) != order(take(source, 4, seed=2))


def test_processes_share_the_examples(source):
    shares = [order(take(source, 5, batch_size=2, rank=rank, world=2)) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(10))


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_restored_iterator_goes_on_with_the_next_batch(source, stop):
    clip = load(jitter=True)
    whole = take(source, 8, clip=clip)
    batches = training_batches(clips(source, clip), batch_size=3, seed=0)
    for _ in range(stop):
        next(batches)
    place = batches.examples
    batches.close()
    again = training_batches(clips(source, clip), batch_size=3, seed=0)
    again.seek(place)
    rest = [next(again) for _ in range(8 - stop)]
    again.close()
    assert equal(rest, whole[stop:])


def test_jitter_takes_one_instant_of_each_segment(source):
    seen = set()
    for batch in take(source, 30, clip=load(jitter=True)):
        for place, frames in zip(batch["index"], batch["frames"], strict=True):
            numbers, segment = read_numbers(frames), (8 + int(place)) / 4
            assert all(
                int(k * segment) <= number <= (k + 1) * segment for k, number in enumerate(numbers)
            )
            seen.add((int(place), tuple(numbers)))
    assert len(seen) > 20


def test_a_clip_is_padded_and_never_longer(source):
    batches = take(source, 4, clip=load(frames=4, mode="fps", fps=2.0), batch_size=2)
    for batch in batches:
        frames = [-(-(8 + int(place)) * 2 // 8) for place in batch["index"]]  # ceil(seconds x 2)
        assert batch["valid"].sum(1).tolist() == [min(4, count) for count in frames]
        assert not batch["frames"][~batch["valid"]].any()
    assert any(not batch["valid"].all() for batch in batches)


def test_a_bad_video_is_an_empty_clip_and_is_logged(source, caplog):
    broken = Videos([*source[:2], Example("broken", "gone.mp4", "q", None, None, None)])
    with caplog.at_level(logging.WARNING):
        (batch,) = take(broken, 1)
    row = int(np.flatnonzero(batch["index"] == 2)[0])
    assert not batch["valid"][row].any() and not batch["frames"][row].any()
    assert batch["answer"][row] == "" and batch["valid"].sum() == 8
    assert any("skipped broken" in line and "gone.mp4" in line for line in caplog.messages)


def test_whatever_a_video_raises_is_an_empty_clip_and_is_logged(source, caplog, monkeypatch):
    def clean(picture, size, resize=RESIZES["clean"]):
        return resize(picture, size) if picture.shape == (64, 64, 3) else 1 / 0

    monkeypatch.setitem(RESIZES, "clean", clean)
    odd = encode(None, numbered_frames(8, 96, 96), fps=8)
    broken = Videos([*source[:2], Example("odd", odd, "q", "a", None, None)])
    with caplog.at_level(logging.WARNING):
        (batch,) = take(broken, 1)
    assert batch["valid"].sum(1)[batch["index"] == 2].tolist() == [0] and batch["valid"].sum() == 8
    assert any("skipped odd" in line and "ZeroDivisionError" in line for line in caplog.messages)


def test_too_few_examples_are_refused(source):
    with pytest.raises(DataError, match="10 training examples do not fill one batch of 11"):
        take(source, 1, batch_size=11)
    with pytest.raises(DataError, match="batch of 12"):
        take(source, 1, batch_size=12, world=2)
    with pytest.raises(DataError, match="batch_size = 5 does not divide over 2 processes"):
        take(source, 1, batch_size=5, world=2)


def test_stacked_texts_keep_their_characters():
    rows = [
        {"frames": np.zeros(2), "question": text, "answer": text * 2}
        for text in ("é✓ ", "", "a longer one")
    ]
    batch = stack(rows)
    assert batch["question"].tolist() == ["é✓ ", "", "a longer one"]
    assert batch["answer"].tolist()[0] == "é✓ é✓ " and batch["frames"].shape == (3, 2)
