"""Damage that demuxers and decoders conceal, and videos that make them raise anything at all."""

from __future__ import annotations

import numpy as np
import pytest

from adacm2_jax.errors import DataError
from adacm2_jax.video.frames import Sampling, probe, read_clip
from adacm2_jax.video.resize import RESIZES
from tests.video.make_videos import (
    FORMATS,
    VP9,
    encode,
    numbered_frames,
    read_numbers,
    with_hole,
    with_matrix,
)

KEYS = {"g": "25"}
HOLED = {
    "webm-vp9": {"container": "webm", **VP9},
    "webm-vp8": {
        "container": "webm",
        "codec": "libvpx",
        "options": KEYS | {"deadline": "realtime"},
    },
    "asf": {"container": "asf", "codec": "msmpeg4", "options": KEYS},
    "wmv": {"container": "asf", "codec": "wmv2", "options": KEYS},
    "avi-mpeg4": {"container": "avi", "codec": "mpeg4", "options": KEYS},
    "avi-h264": {"container": "avi", "options": KEYS},
    "mkv-h264": {"container": "matroska", "options": KEYS},
    "mp4-h264": {"options": KEYS},
    "mp4-av1": FORMATS["mp4-av1"],
    "mpegts": {"container": "mpegts", "options": KEYS},
    "mpeg": {"container": "mpeg", "codec": "mpeg2video", "fps": 25, "options": {"g": "12"}},
    "flv": {"container": "flv", "options": KEYS},
    "nut": {"container": "nut", "options": KEYS},
}


@pytest.mark.parametrize("name", HOLED)
def test_a_hole_in_the_middle_is_told_and_shifts_nothing(name):
    data = encode(None, numbered_frames(300), **HOLED[name])
    fps = HOLED[name].get("fps", 10)
    said: list[str] = []
    for broken in (data, with_hole(data, 0.4, 0.6)):
        said.clear()
        frames = read_clip(broken, Sampling(fps=fps), size=64, on_warning=said.append)
        numbers = read_numbers(frames)
        if broken is data:
            assert not said and numbers == list(range(300))
    assert len(said) == 1 and said[0].startswith(f"<{len(data)} bytes>: ") and "\n" not in said[0]
    assert any(word in said[0] for word in ("damaged packets", "concealed damage", "holes"))
    assert len(numbers) == 300
    wrong = [i for i, number in enumerate(numbers) if number != i]
    # The hole takes a fifth of the bytes; with the key frames, half of the frames at most are lost.
    assert 10 < len(wrong) <= 150
    assert numbers[:50] == list(range(50))
    if name != "mp4-h264":  # whose first key frame, the largest packet, is not followed by another
        assert numbers[-40:] == list(range(260, 300))


def test_silence_beside_a_still_picture_is_no_hole(tmp_path):
    times = [i / 10 for i in range(20)] + [5 + i / 10 for i in range(20)]
    path = tmp_path / "still.mkv"
    encode(path, numbered_frames(40), times=times, container="matroska", silence="pcm_s16le")
    said: list[str] = []
    frames = read_clip(path, Sampling(fps=5), size=64, on_warning=said.append)
    assert read_numbers(frames) == [*range(0, 20, 2), *[19] * 15, *range(20, 40, 2)] and not said


@pytest.mark.parametrize("matrix", [8, 10, 11, 12, 13, 14])
def test_a_colour_matrix_that_cannot_be_converted_is_taken_as_unspecified(matrix, tmp_path):
    with_matrix(tmp_path / "odd.mp4", 5, matrix)
    with_matrix(tmp_path / "plain.mp4", 5, 2)
    said: list[str] = []
    frames = read_clip(tmp_path / "odd.mp4", Sampling(fps=10), size=64, on_warning=said.append)
    assert said == [
        f"{tmp_path}/odd.mp4: its colour matrix (number {matrix}) cannot be converted, so colours "
        "are taken as of a video that names none"
    ]
    plain = read_clip(tmp_path / "plain.mp4", Sampling(fps=10), size=64)
    np.testing.assert_array_equal(frames, plain)


def test_whatever_a_video_raises_names_the_video(tmp_path, monkeypatch):
    encode(tmp_path / "odd.mp4", numbered_frames(5))

    def broken(picture: np.ndarray, size: int) -> np.ndarray:
        raise ZeroDivisionError("no such\npicture\x1b[31m")

    monkeypatch.setitem(RESIZES, "clean", broken)
    with pytest.raises(DataError) as error:
        read_clip(tmp_path / "odd.mp4", Sampling(), size=64)
    assert str(error.value) == (
        f"{tmp_path}/odd.mp4: cannot be read (ZeroDivisionError: no such): convert it to H.264 in "
        "MP4"
    )
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_want_of_memory_is_not_told_as_a_broken_file(tmp_path, monkeypatch):
    encode(tmp_path / "large.mp4", numbered_frames(5))

    def greedy(picture: np.ndarray, size: int) -> np.ndarray:
        return np.zeros(1 << 62, np.uint8)

    monkeypatch.setitem(RESIZES, "clean", greedy)
    with pytest.raises(
        DataError, match=r"large\.mp4: there is not enough memory .* free some"
    ) as e:
        read_clip(tmp_path / "large.mp4", Sampling(), size=64)
    assert "H.264" not in str(e.value)


def test_random_bytes_anywhere_end_in_frames_or_in_an_error_that_names_the_video():
    rng = np.random.default_rng(0)
    for name in ("mp4-h264", "mkv-h264", "avi-mpeg4", "mpegts-h264", "mp4-fragmented"):
        data = encode(None, numbered_frames(30), **FORMATS[name])
        for _ in range(8):
            broken = np.frombuffer(data, np.uint8).copy()
            places = rng.integers(len(broken), size=rng.integers(1, 60))
            broken[places] = rng.integers(256, size=len(places))
            try:
                read_clip(broken.tobytes(), Sampling(fps=2), size=32, on_warning=lambda _: None)
            except DataError as error:
                assert str(error).startswith(f"<{len(data)} bytes>: ") and "\n" not in str(error)


def test_a_name_with_escapes_is_told_without_them(tmp_path):
    path = tmp_path / "a\x1b[31m\nb.mp4"
    with pytest.raises(DataError) as error:
        probe(path)
    assert str(error.value) == f"{tmp_path}/a\\x1b[31m\\nb.mp4: no such file: check the path"
    encode(path, numbered_frames(3))
    assert len(read_clip(path, Sampling(fps=10), size=64)) == 3
