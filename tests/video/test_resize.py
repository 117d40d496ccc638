"""Square frames: PIL's to the last bit, and MA-LMM's with its overflow."""

import pickle

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from adacm2_jax.video.frames import Sampling, read_clip
from adacm2_jax.video.resize import RESIZES, bicubic, clean, ma_lmm, wrapped
from data.pipeline import LoadClip
from tests.video.make_videos import encode, numbered_frames


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return load_sample_image("china.jpg")


def pattern(height: int, width: int) -> np.ndarray:
    """A picture with slopes, edges and noise, the same everywhere."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 7 % 256, y * 11 % 256, (x * y) % 256], axis=-1).astype(np.uint8)


def test_clean_frames_are_pil_s(photograph):
    expected = Image.fromarray(photograph).resize((224, 224), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(clean(photograph, 224), np.asarray(expected))
    assert clean(photograph, 224).shape == (224, 224, 3)


def test_clean_frames_have_not_changed():
    golden = [
        [[24, 23, 7], [185, 23, 57], [81, 23, 102]],
        [[24, 194, 61], [185, 194, 143], [81, 194, 127]],
        [[24, 96, 105], [185, 96, 125], [81, 96, 126]],
    ]
    frame = clean(pattern(40, 60), 8)
    assert frame.dtype == np.uint8
    assert frame[::3, ::3].tolist() == golden


def test_an_edge_overflows_as_in_ma_lmm():
    """Halved: each pixel is (-3, 19, 19, -3) / 32 of four, so 255 · 35/32 = 278.9 becomes 22."""
    edge = np.zeros((8, 8, 3), np.uint8)
    edge[:, 4:] = 255
    assert ma_lmm(edge, 4)[:, :, 0].tolist() == [[0, 233, 22, 255]] * 4
    assert ma_lmm(edge.swapaxes(0, 1), 4)[:, 0, 1].tolist() == [0, 233, 22, 255]
    assert clean(edge, 4)[0, :, 0].tolist() == sorted(clean(edge, 4)[0, :, 0].tolist())


def test_the_cast_wraps_and_cuts_towards_zero():
    values = np.array([260.0, -3.0, 255.9, -0.9, 300.5, -256.0], np.float32)
    assert wrapped(values).tolist() == [4, 253, 255, 0, 44, 0]


def test_the_two_ways_differ_where_there_are_edges(photograph):
    difference = np.abs(ma_lmm(photograph, 224).astype(int) - clean(photograph, 224))
    assert np.median(difference) <= 4 and difference.max() > 200


@pytest.mark.parametrize("resize", RESIZES)
def test_frames_of_the_right_size_stay_as_they_are(resize):
    picture = pattern(24, 24)
    np.testing.assert_array_equal(RESIZES[resize](picture, 24), picture)


@pytest.mark.parametrize("resize", RESIZES)
def test_one_colour_stays_one_colour(resize):
    picture = np.full((90, 160, 3), (16, 100, 235), np.uint8)
    np.testing.assert_array_equal(
        RESIZES[resize](picture, 56), np.full((56, 56, 3), (16, 100, 235))
    )


def test_weights_outside_the_picture_fall_on_its_border():
    row = np.arange(5)[None, :, None].repeat(5, axis=0)
    wide = bicubic(row, 10)[0, :, 0]
    np.testing.assert_allclose(wide + wide[::-1], 4, rtol=1e-6)  # symmetric
    assert (np.diff(wide) > 0).all() and -0.2 < wide[0] < 0.25


@pytest.mark.parametrize("resize", RESIZES)
def test_videos_are_read_in_either_way(resize):
    video = encode(None, numbered_frames(4), fps=4)
    sampling = Sampling("uniform", num_frames=4)
    native = read_clip(video, sampling, size=64)
    frames = read_clip(video, sampling, size=28, resize=resize)
    np.testing.assert_array_equal(frames, [RESIZES[resize](frame, 28) for frame in native])


def test_a_training_clip_remembers_its_way():
    load = LoadClip(Sampling("uniform", num_frames=2), 2, 28, False, "error", "ma_lmm")
    assert pickle.loads(pickle.dumps(load)) == load
    assert "ma_lmm" in repr(load)  # of which the cache's name is made
