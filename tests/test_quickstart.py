"""The quickstart's parts that need no training: its clips, its table, what it says to do next."""

import pathlib
import shlex

import pytest

import quickstart
from adacm2_jax.video.frames import probe, read_clip
from adacm2_jax.video.sampling import Sampling
from data.jsonl import JsonlSource
from tests.data.test_needle import asked_in, colours_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The work directory and its clips; test sets of two short videos each."""
    workdir = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "LENGTHS", {3: 2, 4: 2})
        return workdir, quickstart.make_videos(workdir)


def test_the_clips_are_ordinary_videos_with_a_question_and_its_answer(made):
    workdir, clips = made
    source = JsonlSource(workdir / "clips" / "questions.jsonl")
    assert len(source) == len(clips) == 2
    for example, clip in zip(source, clips, strict=True):
        info = probe(example.video)
        assert (info.codec, info.width, info.fps) == ("h264", 256, 1) and info.duration >= 64
        assert pathlib.Path(example.video).samefile(clip["video"])
        assert (example.question, example.answer) == (clip["question"], clip["answer"])
        frames = read_clip(example.video, Sampling("fps", fps=1.0), size=64)
        assert colours_of(frames).count(asked_in(example.question)) == 1
        assert example.answer in set("0123456789")


def test_test_sets_are_made_once(made, monkeypatch):
    workdir, clips = made
    monkeypatch.setattr(quickstart, "LENGTHS", {3: 2, 4: 2})
    files = {path: path.stat().st_mtime_ns for path in (workdir / "data").rglob("*.array_record*")}
    assert len({path.parent for path in files}) == 2
    assert quickstart.make_videos(workdir) == clips
    assert files == {path: path.stat().st_mtime_ns for path in files}


def row(policy: str, length: int, accuracy: float) -> dict:
    kept = {"kept_tokens": 12, "total_tokens": 17 * length}
    return {"policy": policy, "T": length, "accuracy": accuracy, "interval": [0.9, 1.0], **kept}


def test_the_table_has_a_line_for_each_policy_and_a_cell_for_each_length(tmp_path):
    rows = [row(name, t, 0.95) for t in quickstart.LENGTHS for name in quickstart.POLICIES]
    lines = quickstart.table(rows).split("\n")
    for policy in quickstart.POLICIES:
        (line,) = [line for line in lines if line.startswith(policy)]
        assert line.count("95.0% (90.0%-100.0%)") == 3 and "12/1088" in line
    quickstart.draw(rows, tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_a_stage_that_is_done_is_left_as_it_is(tmp_path, monkeypatch):
    for stage in ("first", "second"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.json").write_text("{}")
        quickstart.train_stage(stage, tmp_path)
        assert [path.name for path in (tmp_path / stage).iterdir()] == ["metrics.json"]


def test_what_to_do_next_can_be_pasted(made):
    from adacm2_jax.commands.__main__ import parser

    workdir, clips = made
    text = quickstart.what_next(workdir, clips[0], minutes=4.24)
    assert "Done in 4.2 minutes" in text
    lines = text.replace("\\\n", "").split("\n")
    (ask,) = [shlex.split(line) for line in lines if " ask " in line and "--model" in line]
    assert pathlib.Path(ask[0]).name == "adacm2"
    parsed = parser().parse_args(ask[1:])
    assert pathlib.Path(parsed.video).samefile(clips[0]["video"])
    assert parsed.question == [clips[0]["question"]]
