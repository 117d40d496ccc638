"""The picture of a memory: which frames it shows, and that kept patches stand out in it."""

import warnings

import numpy as np
import pytest
from PIL import Image

from adacm2_jax.errors import UserError
from adacm2_jax.inference.picture import Counts, choose_frames, draw_memory

COUNTS = Counts(seen=340, kept=3, bound=12)


def drawn(path, frames, kept, **options) -> np.ndarray:
    """The picture's pixels."""
    times = np.arange(len(frames), dtype=float)
    draw_memory(path, frames, kept, times, "what was on red?", "7", COUNTS, **options)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def pixels_near(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(picture - colour).max(-1) <= 6).sum())


def test_frames_that_hold_most_the_newest_and_dropped_ones_between_are_shown():
    held = np.zeros(200, int)
    held[[3, 50, 120, 199]] = 5, 9, 2, 1
    chosen = choose_frames(held, shown=8, dropped=2)
    assert chosen == sorted(chosen) and len(set(chosen)) == 8
    assert {3, 50, 120, 199} <= set(chosen)
    # The dropped ones halve the longest gaps: none of 2 and more shown frames' width is left.
    assert max(np.diff(chosen)) <= 40


def test_dropped_frames_keep_their_places_where_many_frames_hold_tokens():
    held = np.arange(100) % 2 * np.arange(1, 101)
    chosen = choose_frames(held, shown=10, dropped=4)
    assert sum(held[t] == 0 for t in chosen) == 4
    assert {99, 97, 95, 93, 91, 89} <= set(chosen)


@pytest.mark.parametrize("count", [1, 5, 11])
def test_a_short_video_is_shown_whole(count):
    assert choose_frames(np.zeros(count, int), shown=11) == list(range(count))


def test_kept_patches_stand_out_and_the_rest_is_veiled(tmp_path):
    """Two patches of one frame of pure magenta: they alone stay magenta, 2 of 16 of its area."""
    frames = np.full((20, 32, 32, 3), 255, np.uint8)
    frames[7] = 255, 0, 255
    none = drawn(tmp_path / "none.png", frames, [np.zeros((0, 2), int)], grid=(4, 4))
    two = drawn(tmp_path / "two.png", frames, [[(7, 1), (7, 6)], [(7, 6)]], grid=(4, 4))
    all_of_it = [[(7, patch) for patch in range(1, 17)]]
    whole = drawn(tmp_path / "whole.png", frames, all_of_it, grid=(4, 4))
    assert pixels_near(none, (255, 0, 255)) == 0
    share = pixels_near(two, (255, 0, 255)) / pixels_near(whole, (255, 0, 255))
    # Outlines cover a little of every patch, more of the one that two layers keep.
    assert share == pytest.approx(2 / 16, rel=0.25)


def test_a_kept_cls_token_stands_for_the_whole_frame(tmp_path):
    frames = np.full((12, 30, 40, 3), 255, np.uint8)
    frames[3] = 255, 0, 255
    cls = drawn(tmp_path / "cls.png", frames, [[(3, 0)]], grid=(3, 4))
    patch = drawn(tmp_path / "patch.png", frames, [[(3, 12)]], grid=(3, 4))
    assert pixels_near(cls, (255, 0, 255)) > 8 * pixels_near(patch, (255, 0, 255)) > 0


def test_other_grids_lengths_and_texts_are_drawn(tmp_path):
    frames = np.zeros((1, 48, 64, 3), np.uint8)
    drawn(tmp_path / "one.png", frames, [[(0, 256)]])
    drawn(tmp_path / "wrong.png", frames, [[(0, 1)]], truth="8")
    times = np.linspace(0, 7200, 3000)
    draw_memory(
        tmp_path / "long.png",
        np.zeros((3000, 8, 8, 3), np.uint8),
        [[(2999, 4), (17, 0)]] * 6,
        times,
        "why " * 100,
        "because " * 40,
        Counts(3000 * 257, 60, 0),
    )
    sizes = {Image.open(path).size for path in tmp_path.iterdir()}
    assert len(sizes) == 1 and min(*sizes.pop()) > 500


def test_texts_are_no_formulas_and_hold_no_control_characters(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of matplotlib, about a character that no font has
        draw_memory(
            tmp_path / "text.png",
            np.zeros((1, 8, 8, 3), np.uint8),
            [[(0, 1)]],
            np.zeros(1),
            r"is it $\nothing$ or \frac{$1}?",
            "$5 \x16",
            COUNTS,
        )


@pytest.mark.parametrize(
    ("kept", "words"),
    [([[(5, 1)]], ["frame 5", "there are 5"]), ([[(0, 17)]], ["patch 17", "4 x 4"])],
)
def test_tokens_that_no_frame_has_are_refused(tmp_path, kept, words):
    with pytest.raises(UserError) as error:
        drawn(tmp_path / "no.png", np.zeros((5, 8, 8, 3), np.uint8), kept, grid=(4, 4))
    assert all(word in str(error.value) for word in words)
    assert not (tmp_path / "no.png").exists()
