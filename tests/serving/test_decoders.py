"""Decoding in processes of their own: right frames, clear errors, and no file that ends more than
its own process."""

import contextlib
import dataclasses
import os
import signal
import time

import numpy as np
import PIL.Image
import pytest

from adacm2_jax.errors import DataError
from adacm2_jax.serving.decoders import Decoders, Media
from adacm2_jax.serving.limits import BusyError, Limits
from adacm2_jax.video.frames import read_clip
from adacm2_jax.video.resize import RESIZES
from adacm2_jax.video.sampling import Sampling
from tests.video.make_videos import encode, numbered_frames

SIZE, CHUNK = 28, 4
LIMITS = Limits(decoders=1, decoder_seconds=20, frames=100, pixels=200 * 200)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    encode(path, numbered_frames(100), fps=10)
    return path


@pytest.fixture(scope="module")
def decoders():
    made = Decoders(LIMITS, SIZE, CHUNK, "clean", "error")
    yield made
    made.close()


def decoded(decoders, media) -> np.ndarray:
    with decoders.decode(media) as (total, chunks):
        pieces = list(chunks)
    assert sum(map(len, pieces)) == total
    assert all(len(piece) == CHUNK for piece in pieces[:-1])
    return np.concatenate(pieces)


def test_a_video_has_the_frames_that_are_read_without_a_process(decoders, clip):
    for media in (
        Media("video", (str(clip),), "it"),
        Media("video", (str(clip),), "it", fps=2.0, start=1.0, end=4.5),
    ):
        expected = read_clip(
            clip, Sampling("fps", fps=media.fps), size=SIZE, start=media.start, end=media.end
        )
        np.testing.assert_array_equal(decoded(decoders, media), expected)


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_pictures_become_frames_upright(decoders, tmp_path, kind):
    rng = np.random.default_rng(0)
    paths, expected = [], []
    for number in range(5):
        pixels = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
        picture = PIL.Image.fromarray(pixels)
        path = tmp_path / f"{number}.{kind}"
        exif = PIL.Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        picture.save(path, exif=exif, **({"lossless": True} if kind == "webp" else {}))
        paths.append(str(path))
        with PIL.Image.open(path) as stored:
            upright = np.rot90(np.asarray(stored.convert("RGB")), -1)
        expected.append(RESIZES["clean"](upright, SIZE))
    got = decoded(decoders, Media("pictures", tuple(paths), "frames"))
    np.testing.assert_array_equal(got, np.stack(expected))


def test_what_cannot_be_used_is_told_by_the_callers_name(decoders, tmp_path, clip):
    text = tmp_path / "text.mp4"
    text.write_text("no video at all " * 100)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    large = tmp_path / "large.png"
    PIL.Image.fromarray(np.zeros((201, 200, 3), np.uint8)).save(large)
    for media, words in (
        (Media("video", (str(text),), "messages[0]"), "not a video"),
        (Media("video", (str(cut),), "messages[0]"), "incomplete"),
        (Media("video", (str(clip),), "messages[0]", fps=30.0), "has 300 frames at 30 a second"),
        (Media("video", (str(clip),), "messages[0]", start=60.0), "60"),
        (Media("pictures", (str(text),), "messages[0]"), "no picture"),
        (Media("pictures", (str(clip),), "messages[0]"), "no picture"),
        (Media("pictures", (str(large),), "messages[0]"), "200 x 201"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            decoded(decoders, media)
        assert "messages[0]" in str(caught.value) and str(tmp_path) not in str(caught.value)
    assert len(decoded(decoders, Media("video", (str(clip),), "it"))) == 10  # nothing has changed


def test_a_large_header_is_refused_before_a_pixel_is_decoded(decoders, tmp_path):
    """16,384 x 16,384 in a small PNG: 800 MB of pixels."""
    bomb = tmp_path / "bomb.png"
    PIL.Image.new("1", (16384, 16384)).save(bomb)
    began = time.monotonic()
    with pytest.raises(DataError, match="16384 x 16384"):
        decoded(decoders, Media("pictures", (str(bomb),), "it"))
    assert time.monotonic() - began < 10


def test_a_process_that_needs_too_much_memory_says_so_and_the_next_is_well(tmp_path, clip):
    limits = dataclasses.replace(LIMITS, decoder_bytes=64 << 20, pixels=10**9)
    decoders = Decoders(limits, SIZE, CHUNK, "clean", "error")
    large = tmp_path / "large.png"
    PIL.Image.new("RGB", (8000, 8000)).save(large)
    with contextlib.closing(decoders):
        with pytest.raises(DataError, match="memory"):
            decoded(decoders, Media("pictures", (str(large),), "it"))
        assert len(decoded(decoders, Media("video", (str(clip),), "it"))) == 10


def test_a_process_that_takes_too_long_or_dies_is_replaced(clip):
    decoders = Decoders(LIMITS, SIZE, CHUNK, "clean", "error")
    with contextlib.closing(decoders):
        for number, words in ((signal.SIGSTOP, "more than 1 s"), (signal.SIGKILL, "has ended")):
            with decoders.decode(Media("video", (str(clip),), "it")) as (_, chunks):
                next(chunks)
                (process,) = decoders._all
                process._seconds = process._left = 1.0  # what it did so far may take longer
                os.kill(process._process.pid, number)
                with pytest.raises(DataError, match=words):
                    list(chunks)
            assert not decoders._all  # it was ended, and waited for
        assert len(decoded(decoders, Media("video", (str(clip),), "it"))) == 10


def test_one_that_is_left_in_the_middle_disturbs_nobody(decoders, clip):
    with decoders.decode(Media("video", (str(clip),), "it")) as (_, chunks):
        next(chunks)
    assert len(decoded(decoders, Media("video", (str(clip),), "it"))) == 10


def test_who_waits_too_long_for_a_process_is_told(decoders, clip):
    media = Media("video", (str(clip),), "it")
    with (
        decoders.decode(media),
        pytest.raises(BusyError, match="busy"),
        decoders.decode(media, 0.1),
    ):
        pass
