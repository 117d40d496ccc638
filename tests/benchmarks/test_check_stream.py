"""The check of a day of frames: what it shows, and what it finds fault with."""

import json

import numpy as np
import pytest

from benchmarks import check_stream
from benchmarks.check_stream import Stream, memory_faults
from data.needle.render import COLOURS
from tests.data.test_needle import colours_of
from tests.small import quick_compilation


def test_each_needle_is_the_one_frame_of_its_colour():
    stream = Stream(240, seed=0)
    frames = np.concatenate([stream.draw(0, 100, 64), stream.draw(100, 140, 64)])
    shown = colours_of(frames)
    asked = [needle.colour for needle in stream.needles]
    assert len(set(asked)) == 4 and set(shown) == set(COLOURS)
    for needle, hour in zip(stream.needles, (1, 12, 20, 21), strict=True):
        assert [i for i, colour in enumerate(shown) if colour == needle.colour] == [needle.frame]
        assert (hour - 1) * 10 <= needle.frame < hour * 10
        assert needle.colour in needle.question and stream.answer(needle) in set("0123456789")


def measured(**changed: int) -> list[dict]:
    row = {"frames": 1000, "state": 10, "device": 20, "resident": 1000, "compiled": 7}
    return [row, row | {"frames": 2000}, row | {"frames": 3000} | changed]


@pytest.mark.parametrize(
    ("changed", "pushes", "fault"),
    [
        ({"state": 11}, 1, "the state: 10 to 11 bytes"),
        ({"device": 21}, 1, "the arrays on the device"),
        ({"resident": 1031}, 1, "resident memory: +3.1% after 3,000 frames"),
        ({"resident": 969}, 1, "resident memory: -3.1%"),
        ({"compiled": 8}, 1, "compilations after 1,000 frames: 1"),
        ({}, 2, "the push step: compiled 2 times"),
    ],
)
def test_what_changes_is_named(changed, pushes, fault):
    (found,) = memory_faults(measured(**changed), pushes)
    assert fault in found


def test_what_stays_is_no_fault():
    assert memory_faults(measured(resident=1029), 1) == []


def test_a_model_that_has_learned_nothing_is_found_out(small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_stream, "EVERY", 15)  # chunks of three frames
    monkeypatch.setattr(check_stream, "SETTLED", 30)
    check_stream.session_steps.push.clear_cache()
    with quick_compilation():
        words = ["--model", small_run, "--frames", 60, "--json", tmp_path / "found.json"]
        assert check_stream.main([*map(str, words)]) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["frames"] for row in found["measured"]] == [15, 30, 45, 60]
    assert found["push_compiled"] == 1 and found["compiled_after"] == 0
    assert len(found["state_bytes"]) == len(found["device_bytes"]) == 1
    assert len(found["answers"]) == 4 and found["answers"][-1]["policy"] == "open"
    wrong = [each["question"] for each in found["answers"] if each["answer"] != each["right"]]
    errors = capsys.readouterr().err
    assert wrong and all(f"{question} " in errors for question in wrong)
