"""The needle task: what its videos promise, and that they survive the way through a file."""

import io
import json

import av
import numpy as np
import pytest

from adacm2_jax.config import from_dict
from adacm2_jax.errors import DataError
from adacm2_jax.inference.processor import Processor, train_tokenizers
from adacm2_jax.video.frames import Sampling, probe, read_clip
from configs import needle
from data.needle import builder
from data.needle.builder import build, make_record
from data.needle.drawn import LABELS, DrawnClips, labelled_frames
from data.needle.render import (
    COLOURS,
    QUESTIONS,
    draw_video,
    encode,
    load_digits,
    plan_video,
)
from data.pipeline import LoadClip, clips
from data.sources import RecordSource


def draw(split: str, length: int, rng: np.random.Generator, repeat: bool = True):
    """Frames, the colour asked for, its digit and its frame number."""
    digits, labels = load_digits(split)
    plot = plan_video(len(labels), length, rng, repeat)
    frames = draw_video(plot, digits, rng)
    return frames, plot.asked, int(labels[plot.images[plot.needle]]), plot.needle


def asked_in(question: str) -> str:
    """The one colour that a question names."""
    (colour,) = [name for name in COLOURS if name in question]
    assert question in {text.format(colour) for text in QUESTIONS}
    return colour


def colours_of(frames: np.ndarray) -> list[str]:
    """The ground of every frame, by its border."""
    names, values = list(COLOURS), np.array(list(COLOURS.values()), float)
    corners = frames[:, :3].reshape(len(frames), -1, 3).mean(1)
    # A ground's brightness varies by up to 12 steps.
    distance = np.linalg.norm(
        (corners[:, None] - corners[:, None].mean(-1, keepdims=True))
        - (values - values.mean(-1, keepdims=True)),
        axis=-1,
    ) + 0.2 * np.abs(corners.mean(-1)[:, None] - values.mean(-1))
    return [names[i] for i in distance.argmin(1)]


def test_labelled_frames_show_what_they_say():
    images, labels = next(labelled_frames(200, 64, seed=3))
    assert images.shape == (200, 64, 64, 3) and images.dtype == np.uint8
    assert LABELS == {"digit": 10, "colour": 8}
    assert colours_of(images) == [list(COLOURS)[colour] for colour in labels["colour"]]
    # Without the ground, and shrunk to the digits' size, a frame is nearest to digits of its label.
    digits, kinds = load_digits("train")
    light = images.mean(-1, dtype=np.float64) / images[:, :3].mean((1, 2, 3))[:, None, None]
    small = 1 - light[:, 4:60, 4:60].reshape(200, 8, 7, 8, 7).mean((2, 4))
    distance = np.linalg.norm(small[:, None] - digits, axis=(2, 3))
    assert (kinds[distance.argmin(1)] == labels["digit"]).mean() > 0.9
    again, same = next(labelled_frames(200, 64, seed=3))
    np.testing.assert_array_equal(images, again)
    assert all((labels[kind] == same[kind]).all() for kind in LABELS)


def test_train_and_test_share_no_digit():
    (train, train_labels), (test, test_labels) = load_digits("train"), load_digits("test")
    assert len(train) + len(test) == 1797 and len(test) == 359
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}
    assert set(train_labels) == set(test_labels) == set(range(10))


@pytest.mark.parametrize("length", [1, 3, 4, 16, 60])
def test_one_frame_alone_has_the_colour_asked_for_and_others_repeat(length):
    for seed in range(8):
        frames, colour, digit, needle = draw("test", length, np.random.default_rng(seed))
        assert frames.shape == (length, 64, 64, 3) and frames.dtype == np.uint8
        shown = colours_of(frames)
        assert [i for i, name in enumerate(shown) if name == colour] == [needle]
        for name in set(shown) - {colour}:
            assert shown.count(name) > 1
        assert 0 <= digit <= 9


def test_a_video_of_thousands_of_frames():
    frames, colour, _, needle = draw("train", 3000, np.random.default_rng(0))
    assert len(frames) == 3000
    assert [i for i, name in enumerate(colours_of(frames)) if name == colour] == [needle]


def test_the_needle_shows_the_digit_that_is_the_answer():
    """A nearest neighbour among all digits, drawn alike, reads the answer off the needle."""
    digits, labels = load_digits("test")
    right = 0
    for number in range(40):
        rng = np.random.default_rng([5, number])
        frames, _, digit, needle = draw("test", 4, rng)
        # The ink darkens: a digit's share of its ground, seen at 8 x 8.
        ink = 255 - frames[needle].max(-1)[6:58, 6:58].astype(float)
        small = ink[: 52 // 8 * 8, : 52 // 8 * 8].reshape(8, 6, 8, 6).mean((1, 3))
        small -= small.min()
        similarity = (digits.reshape(-1, 64) @ small.ravel()) / np.linalg.norm(
            digits.reshape(-1, 64), axis=1
        )
        right += labels[similarity.argmax()] == digit
    assert right >= 20  # 4 by chance


def test_a_record_depends_on_its_number_alone():
    one, other = make_record("train", 4, 7), make_record("train", 4, 7)
    assert one == other
    assert one != make_record("train", 4, 8) and one["video"] != make_record("test", 4, 7)["video"]
    assert asked_in(one["question"]) in COLOURS
    assert one["end"] == one["start"] + 1


def test_frames_survive_the_file():
    frames, colour, _, needle = draw("train", 12, np.random.default_rng(1))
    data = encode(frames)
    info = probe(data)
    assert (info.codec, info.width, info.height) == ("h264", 64, 64)
    assert info.duration == pytest.approx(12) and info.fps == pytest.approx(1)
    with av.open(io.BytesIO(data)) as container:
        assert container.format.name.startswith("mov,mp4")
    read = read_clip(data, Sampling("uniform", num_frames=12), size=64)
    assert np.abs(read.astype(float) - frames).mean() < 4  # of 255: H.264 at crf 18
    assert colours_of(read) == colours_of(frames)
    part = read_clip(data, Sampling("uniform", num_frames=1), size=64, start=needle, end=needle + 1)
    assert colours_of(part) == [colour]


def test_a_build_is_the_same_each_time_and_is_done_once(tmp_path):
    sizes = {"train": 5, "test": 3}
    first, second = build(tmp_path / "a", 3, sizes), build(tmp_path / "b", 3, sizes)
    for split, size in sizes.items():
        one, other = list(RecordSource(first, split)), list(RecordSource(second, split))
        assert one == other and len(one) == size
        expected = {make_record(split, 3, n)["id"]: make_record(split, 3, n) for n in range(size)}
        for example in one:
            record = expected[example.id]
            assert (example.video, example.question) == (record["video"], record["question"])
            assert example.answer == record["answer"] and example.start is None
    files = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert build(tmp_path / "a", 3, sizes) == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == files


def test_evidence_only_is_the_needle_s_second(tmp_path):
    directory = build(tmp_path, 5, {"test": 4})
    for example in RecordSource(directory, "test", evidence_only=True):
        assert example.end == example.start + 1
        clip = read_clip(
            example.video,
            Sampling("uniform", num_frames=1),
            size=64,
            start=example.start,
            end=example.end,
        )
        assert colours_of(clip) == [asked_in(example.question)]


@pytest.mark.parametrize(
    ("length", "sizes"), [(0, {"test": 1}), (2, {"test": 1}), (3, {}), (3, {"test": 0})]
)
def test_impossible_data_sets_are_refused(tmp_path, length, sizes):
    with pytest.raises(DataError, match=r"data\.needle"):
        build(tmp_path, length, sizes)
    assert not list(tmp_path.iterdir())


def test_many_videos_are_drawn_by_processes_and_are_the_same(tmp_path, monkeypatch):
    sizes = {"test": 20}
    alone = build(tmp_path / "alone", 3, sizes)
    monkeypatch.setattr("data.needle.builder._FEW_FRAMES", 0)
    together = build(tmp_path / "together", 3, sizes)
    assert list(RecordSource(alone, "test")) == list(RecordSource(together, "test"))


def wordings(examples) -> list[str]:
    """The questions without their colours."""
    return [each.question.replace(asked_in(each.question), "{}") for each in examples]


def test_tests_ask_in_one_wording_and_training_in_all():
    tested = [make_record("test", 4, number)["question"] for number in range(20)]
    assert {text.replace(asked_in(text), "{}") for text in tested} == {QUESTIONS[0]}
    for length, share in ((1, 1 / 16), (4, 1 / 4)):
        trained = wordings(DrawnClips(length, 128))
        assert set(trained) == set(QUESTIONS)
        assert sum(text != QUESTIONS[0] for text in trained) == 128 * share


def test_ordinary_questions_fit_the_model_that_is_asked_later(tmp_path):
    """Whatever words they use: a word that no training text has is spelled out."""
    config = from_dict(needle.get_config().model.to_dict())
    texts = [text for each in DrawnClips(1, 400) for text in (each.question, each.answer)]
    processor = train_tokenizers(texts, config, tmp_path)
    assert config.max_text_len >= 24
    known = processor.questions(["which digit was shown on the red ground in this video?"])
    assert known.qformer_mask.sum() == 2 + 12  # [CLS] and [SEP]; each word and mark is known
    processor.questions(["what's on the red one?"])  # its mark is unknown, and is not refused
    strange = ["Which number is written on scarlet?", "what was on the red one?", ""]
    question = processor.questions(strange)
    assert question.qformer_mask.sum(1).max() <= config.max_text_len
    words = json.loads((tmp_path / "qformer_tokenizer" / "tokenizer.json").read_text())["model"]
    unknown = words["vocab"][words["unk_token"]]
    assert not (question.qformer_ids == unknown)[question.qformer_mask].any()
    # The stage before reads nothing but the task's own questions.
    early = from_dict(needle.get_config("first").model.to_dict())
    Processor.load(tmp_path, early).questions(texts)


def test_videos_of_an_earlier_version_are_read_where_they_are(tmp_path):
    made = build(tmp_path, 3, {"test": 2})
    assert made.name == "2.0.0"
    made.rename(made.with_name("1.0.0"))
    assert build(tmp_path, 3, {"test": 2}) == made.with_name("1.0.0")
    assert not made.exists()
    assert len(RecordSource(made.with_name("1.0.0"), "test")) == 2
    assert build(tmp_path, 3, {"test": 3}).name == "2.0.0"  # another set


def test_a_video_may_be_drawn_larger():
    small, large = make_record("test", 5, 1), make_record("test", 5, 1, size=256)
    info = probe(large["video"])
    assert (info.width, info.height) == (256, 256)
    sampling = Sampling("uniform", num_frames=5)
    one, other = (read_clip(record["video"], sampling, size=32) for record in (small, large))
    assert colours_of(one) == colours_of(other)
    # The same pictures, but for the resolution of edges and two ways through H.264.
    assert np.abs(one.astype(float) - other).mean() < 8
    assert {**small, "video": None} == {**large, "video": None}


def test_drawn_clips_are_the_training_split_without_files(tmp_path):
    """The same numbers give the same questions, answers and, but for H.264, the same pictures."""
    stored = RecordSource(build(tmp_path, 4, {"train": 6}), "train")
    drawn = DrawnClips(4, 6)
    assert len(drawn) == 6
    load = LoadClip(Sampling("uniform", num_frames=4), 4, 64, False, "error")
    pairs = {example.id[-5:]: row for example, row in zip(stored, clips(stored, load), strict=True)}
    for example, clip in zip(drawn, clips(drawn, load), strict=True):
        other = pairs[example.id[-5:]]
        assert (clip["question"], clip["answer"]) == (other["question"], other["answer"])
        assert clip["frames"].shape == (4, 64, 64, 3) and clip["valid"].all()
        assert np.abs(clip["frames"].astype(float) - other["frames"]).mean() < 4


def test_drawn_clips_have_the_model_s_size_and_do_not_change():
    load = LoadClip(Sampling("uniform", num_frames=1), 1, 56, False, "error")
    first, second = (clips(DrawnClips(1, 3), load)[2] for _ in range(2))
    assert first["frames"].shape == (1, 56, 56, 3)
    assert (first["frames"] == second["frames"]).all()
    assert DrawnClips(1, 3).fingerprint() != DrawnClips(4, 3).fingerprint()
    with pytest.raises(IndexError):
        DrawnClips(1, 3)[3]
    with pytest.raises(DataError, match=r"data\.needle\.num_frames = 2"):
        DrawnClips(2, 3)


def test_who_comes_second_takes_the_data_that_another_process_has_made(tmp_path, monkeypatch):
    def meanwhile(*arguments):
        monkeypatch.setattr(builder, "make_record", make_record)
        made.append(build(tmp_path, 3, {"test": 2}))  # the other, which is done first
        return make_record(*arguments)

    made = []
    monkeypatch.setattr(builder, "make_record", meanwhile)
    assert [build(tmp_path, 3, {"test": 2})] == made
    assert len(RecordSource(made[0], "test")) == 2
