"""Training clips of the suite: what is drawn is what was planned, in the mixture that was asked."""

import collections

import numpy as np
import pytest

from adacm2_jax.video.sampling import Sampling
from data.pipeline import LoadClip, clips
from data.suite.drawn import DrawnClips
from data.suite.video import Kind


def test_clips_take_turns_and_are_their_plans():
    kinds = [Kind(task, "grounds", 8) for task in ("needle", "order", "count", "change")]
    source = DrawnClips(kinds, 24)
    assert len(source) == len(list(source)) == 24
    for place, example in enumerate(source):
        kind, number = kinds[place % 4], place // 4
        (question,) = kind.plan("train", number).questions
        assert (example.question, example.answer) == (question.text, question.answer)
        assert example.category == kind.task
        assert (example.video.frames(28) == kind.frames("train", number, 28)).all()
    assert len({example.id for example in source}) == 24
    with pytest.raises(IndexError):
        source[24]


def test_a_kind_that_is_given_twice_shows_twice_as_many_videos():
    kinds = [Kind(task, "grounds", 4) for task in ("needle", "order", "order")]
    source = DrawnClips(kinds, 30)
    ids = [example.id for example in source]
    assert len(set(ids)) == 30
    tasks = collections.Counter(example.category for example in source)
    assert tasks == {"needle": 10, "order": 20}


def test_a_loader_reads_them_at_the_model_s_size():
    source = DrawnClips([Kind("change", "film", 6)], 3)
    load = LoadClip(Sampling("uniform", num_frames=6), 6, 56, False, "error")
    first, second = (clips(source, load)[2] for _ in range(2))
    assert first["frames"].shape == (6, 56, 56, 3) and first["valid"].all()
    np.testing.assert_array_equal(first["frames"], second["frames"])
    assert first["answer"] == source[2].answer


def test_the_identity_changes_with_the_clips():
    kinds = [Kind("needle", "grounds", 4)]
    prints = {
        DrawnClips(kinds, 4).identity(),
        DrawnClips(kinds, 5).identity(),
        DrawnClips(kinds * 2, 4).identity(),
        DrawnClips([Kind("needle", "grounds", 5)], 4).fingerprint(),
    }
    assert len(prints) == 4
    assert DrawnClips(kinds, 4).identity() == DrawnClips(list(kinds), 4).identity()
