"""Videos in lock-step: batches, chunks, padding, and rows that break off."""

import time

import numpy as np
import pytest

from adacm2_jax.errors import DataError
from adacm2_jax.video.frames import Sampling, read_clip
from adacm2_jax.video.resize import RESIZES
from adacm2_jax.video.stream import by_video, open_video, video_batches
from data.jsonl import Example
from tests.video.make_videos import encode, numbered_frames, read_numbers, with_matrix


def example(name: str, video, start=None, end=None) -> Example:
    return Example(name, video, "what?", None, start, end)


def read(examples, batch_size=2, chunk=4, fps=10.0, **options):
    """Batches with each row's numbers, and the videos that could not be opened."""
    bad, batches = [], []
    options = {"sampling": Sampling("fps", fps), "on_warning": lambda line: None} | options
    for batch in video_batches(
        examples,
        batch_size=batch_size,
        chunk=chunk,
        size=64,
        workers=2,
        on_bad_video=lambda row, error: bad.append((row.id, error)),
        **options,
    ):
        chunks = list(batch.chunks)
        for frames, valid in chunks:
            assert frames.shape == (batch_size, chunk, 64, 64, 3) and frames.dtype == np.uint8
            assert valid.shape == (batch_size, chunk)
            assert not frames[~valid].any()
        numbers = [
            [n for frames, valid in chunks for n in read_numbers(frames[i][valid[i]])]
            for i in range(batch_size)
        ]
        batches.append((batch, chunks, numbers))
    return batches, bad


def test_videos_of_any_length_side_by_side():
    lengths = [3, 9, 8, 1, 5]
    examples = [example(str(n), encode(None, numbered_frames(n), fps=10)) for n in lengths]
    batches, bad = read(examples)
    assert not bad
    assert [[row.number for row in batch.rows] for batch, _, _ in batches] == [[0, 1], [2, 3], [4]]
    assert [row.total for batch, _, _ in batches for row in batch.rows] == lengths
    counted = [numbers for _, _, rows in batches for numbers in rows]
    assert counted == [list(range(n)) for n in lengths] + [[]]  # the last row is padding
    assert [len(chunks) for _, chunks, _ in batches] == [3, 2, 2]
    # Valid frames are a prefix of every row, whatever its neighbour's length.
    _, chunks, _ = batches[0]
    assert [valid[0].tolist() for _, valid in chunks] == [
        [True] * 3 + [False],
        [False] * 4,
        [False] * 4,
    ]


def test_a_part_of_a_video():
    video = encode(None, numbered_frames(50), fps=10)
    batches, _ = read([example("part", video, 1.0, 2.0)], batch_size=1)
    assert batches[0][2] == [list(range(10, 20))]


def test_what_cannot_be_opened_is_told_and_left_out(tmp_path):
    good = encode(None, numbered_frames(3), fps=10)
    examples = [
        example("gone", str(tmp_path / "gone.mp4")),
        example("one", good),
        example("text", b"no video at all" * 99),
        example("two", good),
        example("late", good, start=7.0),
    ]
    batches, bad = read(examples)
    assert [name for name, _ in bad] == ["gone", "text", "late"]
    assert [row.example.id for row in batches[0][0].rows] == ["one", "two"]
    assert [row.number for row in batches[0][0].rows] == [1, 3]
    assert batches[0][2] == [[0, 1, 2], [0, 1, 2]]


def test_a_row_that_breaks_off_does_not_touch_its_neighbour():
    options = {"g": "10", "bf": "0"}  # without B-frames the pictures end at one place
    whole = encode(None, numbered_frames(100), fps=10, options=options, container="matroska")
    cut = whole[: len(whole) // 2]
    good = encode(None, numbered_frames(100), fps=10)
    (batch, _, numbers), *_ = read([example("cut", cut), example("good", good)])[0]
    assert "cut short" in batch.rows[0].error and batch.rows[1].error is None
    assert numbers[1] == list(range(100)) and 0 < len(numbers[0]) < 100
    (batch, _, numbers), *_ = read([example("cut", cut)], on_truncated="use")[0]
    assert batch.rows[0].error is None and numbers[0] == list(range(len(numbers[0])))


def test_a_mistagged_video_is_answered_like_the_others(tmp_path):
    with_matrix(tmp_path / "odd.mp4", 20, 8)  # YCgCo, which FFmpeg cannot convert
    good = encode(None, numbered_frames(20), fps=10)
    said: list[str] = []
    names = ["one", "odd", "two", "three"]
    other = encode(None, numbered_frames(20), fps=10, container="matroska")
    videos = [good, str(tmp_path / "odd.mp4"), good, other]
    batches, bad = read(list(map(example, names, videos)), on_warning=said.append)
    assert not bad and all(row.error is None for batch, _, _ in batches for row in batch.rows)
    assert [row for _, _, rows in batches for row in rows] == [list(range(20))] * 4
    assert len(said) == 1 and "odd.mp4: its colour matrix (number 8) cannot be converted" in said[0]


def test_whatever_a_video_raises_fails_its_row_alone(monkeypatch):
    def clean(picture, size, resize=RESIZES["clean"]):
        return resize(picture, size) if picture.shape == (64, 64, 3) else 1 / 0

    monkeypatch.setitem(RESIZES, "clean", clean)
    good, odd = (encode(None, numbered_frames(20, n, n), fps=10) for n in (64, 96))
    other = encode(None, numbered_frames(20), fps=10, container="matroska")
    rows = list(map(example, ["one", "odd", "two", "three"], [good, odd, good, other]))
    batches, bad = read(rows)
    assert not bad
    errors = {row.example.id: row.error for batch, _, _ in batches for row in batch.rows}
    assert len(errors) == 4
    assert errors.pop("odd").startswith(f"<{len(odd)} bytes>: cannot be read (ZeroDivisionError")
    assert set(errors.values()) == {None}
    assert [row for _, _, rows in batches for row in rows if row] == [list(range(20))] * 3


def test_a_row_knows_the_instants_of_what_was_handed_out():
    video = encode(None, numbered_frames(9), fps=10)
    examples = [example("a", video), example("b", video, 0.25, 0.65)]
    batches = video_batches(
        examples,
        batch_size=2,
        chunk=4,
        size=64,
        workers=1,
        on_bad_video=lambda *_: None,
        sampling=Sampling("fps", 10),
    )
    batch = next(batches)
    assert [row.times.tolist() for row in batch.rows] == [[], []]
    next(batch.chunks)
    assert [len(row.times) for row in batch.rows] == [4, 4]
    list(batch.chunks)
    np.testing.assert_allclose(batch.rows[0].times, np.arange(9) / 10)
    np.testing.assert_allclose(batch.rows[1].times, [0.25, 0.35, 0.45, 0.55])


def test_chunks_are_the_clip():
    video = encode(None, numbered_frames(23), fps=10)
    sampling = Sampling("uniform", num_frames=11)
    whole = read_clip(video, sampling, size=32)
    for chunk in (1, 4, 11, 16):
        row = open_video(example("a", video), sampling=sampling, size=32, chunk=chunk)
        frames = np.concatenate([piece.frames for piece in row.chunks])
        np.testing.assert_array_equal(frames, whole)


def test_opening_decodes_nothing(decoded):
    video = encode(None, numbered_frames(60), fps=10)
    row = open_video(example("a", video), 3, sampling=Sampling("fps", 10), size=32, chunk=4)
    assert (row.number, row.total, decoded[0]) == (3, 60, 0)
    next(row.chunks)
    assert 0 < decoded[0] < 20
    with pytest.raises(DataError):
        open_video(example("b", b""), sampling=Sampling(), size=32, chunk=4)


def test_examples_about_the_same_part_of_a_video_are_read_as_one(monkeypatch):
    one, other = (encode(None, numbered_frames(n), fps=10) for n in (5, 9))
    examples = [
        *(example(f"a{i}", one) for i in range(3)),
        example("b", one, 0.1),
        example("c", other),
        example("d", one),
        *(example(f"bad{i}", b"") for i in range(2)),
        *(example(f"e{i}", other) for i in range(5)),
    ]
    groups = [[row.id for row in asked] for _, asked in by_video(examples)]
    assert groups == [
        ["a0", "a1", "a2"],
        ["b"],
        ["c"],
        ["d"],
        ["bad0", "bad1"],
        ["e0", "e1", "e2", "e3", "e4"],
    ]
    options = {
        "batch_size": 4,
        "room": lambda questions: max(1, 4 // questions),
        **{"chunk": 4, "size": 64, "workers": 1, "sampling": Sampling("fps", 10)},
    }
    bad = []
    batches = list(
        video_batches(examples, on_bad_video=lambda row, _: bad.append(row.id), **options)
    )
    held = [[[row.id for row in each.examples] for each in batch.rows] for batch in batches]
    assert held == [[groups[0]], [["b"], ["c"], ["d"]], [groups[5]]]
    assert [(batch.room, batch.end) for batch in batches] == [(1, 3), (4, 8), (1, 13)]
    assert bad == ["bad0", "bad1"]
    # From the end of any batch on they are the same.
    rest = video_batches(
        examples[3:], first=3, on_bad_video=lambda row, _: bad.append(row.id), **options
    )
    assert [(batch.rows[0].number, batch.end) for batch in rest] == [(3, 8), (8, 13)]
    monkeypatch.setattr("adacm2_jax.video.stream.MOST_QUESTIONS", 2)
    assert [number for number, _ in by_video(examples)] == [0, 2, 3, 4, 5, 6, 8, 10, 12]


def test_the_next_batch_is_opened_while_one_is_answered():
    """And no further; of what cannot be opened is told when its own batch comes."""
    videos = [encode(None, numbered_frames(9 + n), fps=10) for n in range(6)]
    videos[2] = b"no video"
    examples = [example(str(number), video) for number, video in enumerate(videos)]
    pulled, bad = [], []

    def source():
        for each in examples:
            pulled.append(each.id)
            yield each

    batches = video_batches(
        source(),
        batch_size=2,
        chunk=4,
        size=64,
        workers=2,
        sampling=Sampling("fps", 10),
        on_warning=lambda line: None,
        on_bad_video=lambda row, _: bad.append(row.id),
        room=lambda questions: 2,
    )
    first = next(batches)
    deadline = time.monotonic() + 20
    while len(pulled) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    # Whether the fifth is of the same video is known when the sixth is seen.
    assert pulled == ["0", "1", "2", "3", "4", "5"] and bad == []
    assert len(list(first.chunks)) == 3
    second = next(batches)
    assert bad == ["2"] and [row.example.id for row in second.rows] == ["3", "4"]
    batches.close()
