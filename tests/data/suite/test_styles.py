"""Drawing: what a plan says is what can be seen, also in the grey and the moving styles."""

import numpy as np
import pytest
from PIL import Image

from adacm2_jax.errors import DataError
from data.needle.render import COLOURS
from data.suite import styles
from data.suite.drawn import LABELS, labelled_frames
from data.suite.plan import Plan
from data.suite.sheet import choose_frames, draw_sheet, write_sheet
from data.suite.styles import PATTERNS, STYLES, WORDS, draw_video
from data.suite.video import Kind, digits_of

DRAWN_STYLES = [style for style in STYLES if style != "traffic"]


def hue(pixels: np.ndarray) -> np.ndarray:
    """Without brightness: a colour's direction from grey, of length 1 where there is one."""
    grey = pixels - pixels.mean(-1, keepdims=True)
    return grey / np.maximum(np.linalg.norm(grey, axis=-1, keepdims=True), 1)


def share_of(frame: np.ndarray, word: str) -> float:
    """How much of a frame has the hue of a colour that is not white."""
    pixels = frame.reshape(-1, 3).astype(float)
    strong = np.ptp(pixels, axis=1) > 90
    near = hue(pixels) @ hue(np.array(COLOURS[word], float)) > 0.97
    return float((strong & near).mean())


def one_shot(style: str, word: str, length: int = 4, image: int = 0) -> Plan:
    words = STYLES[style].pace.words
    return Plan(
        words,
        np.full(length, words.index(word)),
        np.full(length, image),
        np.zeros(length, int),
        (),
    )


@pytest.mark.parametrize("style", [s for s in DRAWN_STYLES if s != "medical"])
def test_a_tile_has_its_colour_and_its_share_of_the_frame(style):
    digits, _ = digits_of("val")
    for word in [name for name in COLOURS if name != "white"]:
        frames = draw_video(one_shot(style, word), style, digits, np.random.default_rng(0), size=56)
        assert frames.shape == (4, 56, 56, 3) and frames.dtype == np.uint8
        for frame in frames:
            shares = {name: share_of(frame, name) for name in COLOURS if name != "white"}
            assert max(shares, key=shares.get) == word
            assert shares[word] > 0.4 * STYLES[style].share ** 2
            assert sum(shares.values()) < 1.05 * STYLES[style].share ** 2 + 0.02


def test_grey_grounds_are_grey_and_differ():
    digits, _ = digits_of("val")
    means, deviations = {}, {}
    for word in PATTERNS:
        plan = one_shot("medical", word, 6)
        frames = draw_video(plan, "medical", digits, np.random.default_rng(1), size=56)
        assert (frames == frames[..., :1]).all()
        border = np.concatenate([frames[:, :4].ravel(), frames[:, -4:].ravel()]).astype(float)
        means[word], deviations[word] = np.median(border), border.std()
    assert means["dark"] < 90 < 130 < means["plain"] < 175 < 210 < means["bright"]
    for word in ("striped", "dotted", "checked", "ringed"):
        assert deviations[word] > 1.4 * deviations["plain"], word


@pytest.mark.parametrize("style", DRAWN_STYLES)
def test_the_digit_can_be_read(style):
    """Who knows the place, size and grounds reads digits by the nearest of all images."""
    images, labels = digits_of("val")
    words = STYLES[style].pace.words
    rng, right, count = np.random.default_rng(2), 0, 40
    templates = images / np.linalg.norm(images, axis=(1, 2), keepdims=True)
    for number in range(count):
        image = int(rng.integers(len(images)))
        plan = one_shot(style, words[number % len(words)], 1, image)
        (frame,) = draw_video(plan, style, images, rng, size=64, share=1.0)
        grey = frame.mean(-1)
        light = plan.words[plan.grounds[0]] == "dark"
        ink = np.clip(grey - 90, 0, None) if light else np.clip(70 - grey, 0, None)
        small = np.asarray(
            Image.fromarray(ink.astype(np.float32)).crop((6, 6, 58, 58)).resize((8, 8))
        )
        found = (templates * small).sum((1, 2)).argmax()
        right += labels[found] == labels[image]
    assert right >= 0.6 * count  # a tenth by chance


@pytest.mark.parametrize("style", ["static", "sport"])
def test_nothing_is_shown_where_nothing_is_planned(style):
    digits, _ = digits_of("val")
    plan = one_shot(style, "red")
    empty = Plan(plan.words, np.full(4, -1), np.full(4, -1), plan.shots, ())
    frames = draw_video(empty, style, digits, np.random.default_rng(3), size=56)
    assert max(share_of(frame, name) for frame in frames for name in COLOURS) < 0.01


def test_a_still_background_stays_and_a_camera_moves():
    digits, _ = digits_of("val")
    moved = {}
    for style in ("static", "sport", "film"):
        kind = Kind("needle", style, 24)
        plan = kind.plan("val", 0)
        frames = draw_video(plan, style, digits, np.random.default_rng(4), 56).astype(float)
        same = (np.diff(plan.shots) == 0) & (plan.images[1:] < 0) | (style == "film")
        steps = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
        moved[style] = steps[same & (np.diff(plan.shots) == 0)].mean()
    assert moved["static"] < 5 < moved["sport"]
    assert moved["film"] > 1


def test_tiles_move_within_the_frame():
    digits, _ = digits_of("val")
    plan = one_shot("static", "red", 12)
    frames = draw_video(plan, "static", digits, np.random.default_rng(5), 56)
    places = []
    for frame in frames:
        y, x = np.nonzero(np.ptp(frame.astype(int), axis=-1) > 90)
        places.append((x.mean(), y.mean()))
        assert np.ptp(x) < 27 and np.ptp(y) < 27
    steps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    assert steps.max() < 9 and np.ptp(places, axis=0).max() > 4


def test_a_smaller_digit_takes_its_share_of_a_ground():
    digits, _ = digits_of("val")
    for share, style in ((0.5, "grounds"), (0.5, "film"), (0.5, "medical"), (0.6, "static")):
        plan = one_shot(style, STYLES[style].pace.words[0], 1)
        rng = np.random.default_rng(6)
        (frame,) = draw_video(plan, style, digits, rng, size=64, share=share)
        dark = frame.mean(-1) < 45 if style != "medical" else frame.mean(-1) > 170
        rows = np.flatnonzero(dark.any(1)) if style != "static" else np.arange(20)
        assert 8 < np.ptp(rows) <= 64 * share


def test_the_same_numbers_draw_the_same_pictures():
    for style in DRAWN_STYLES:
        kind = Kind("needle", style, 6)
        one, other = kind.frames("val", 1, 56), Kind("needle", style, 6).frames("val", 1, 56)
        assert (one == other).all()
        assert (one != kind.frames("val", 2, 56)).any()


def test_labelled_frames_show_what_they_say():
    names = ("grounds", "static", "medical")
    images, labels = next(labelled_frames(96, 56, names, seed=3))
    assert images.shape == (96, 56, 56, 3) and images.dtype == np.uint8
    assert LABELS == {"digit": 11, "ground": 16}
    for place, (frame, ground) in enumerate(zip(images, labels["ground"], strict=True)):
        style = names[place // 8 % 3]
        word = WORDS[ground] if ground < len(WORDS) else ""
        assert (word in PATTERNS) == (style == "medical")
        assert (labels["digit"][place] == 10) == (word == "")
        if word in COLOURS and word != "white":
            assert share_of(frame, word) > 0.05
    empty = labels["ground"] == len(WORDS)
    assert 0 < empty.sum() < 10
    again, same = next(labelled_frames(96, 56, names, seed=3))
    assert (images == again).all() and all((labels[k] == same[k]).all() for k in LABELS)


def test_a_style_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr(styles, "_TRAFFIC_PACKAGES", ("no_such_package_of_anybody",))
    with pytest.raises(DataError, match=r"'traffic' needs traffic_sequence.mp4.*pip install"):
        Kind("needle", "traffic", 16)


def test_a_sheet_has_a_strip_for_each_video(tmp_path):
    kind = Kind("order", "grounds", 40, questions=3)
    sheet = draw_sheet(kind, "val", 2, columns=8, scale=1)
    assert sheet.size == (8 * 60 + 4, 2 * (56 + 28 + 12))
    pixels = np.asarray(sheet)
    framed = (pixels == (255, 0, 200)).all(-1)
    assert framed[:96].any() and framed[96:].any()
    write_sheet(tmp_path / "sheet.png", kind, "val", 1)
    assert Image.open(tmp_path / "sheet.png").size[0] == 16 * 116 + 4
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_a_sheet_shows_the_frames_that_answer():
    assert choose_frames(4, (1,), 16) == [0, 1, 2, 3]
    for total in (17, 64, 1000):
        chosen = choose_frames(total, (3, 11), 8)
        assert {3, 11} <= set(chosen) and len(chosen) == 8 == len(set(chosen))
        assert max(chosen) > total / 2
    assert choose_frames(64, tuple(range(20)), 8) == list(range(8))
