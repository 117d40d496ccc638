"""The quickstart's parts that need no training: its clips, its table, what it says to do next."""

import pathlib
import shlex

import numpy as np
import pytest
from absl import flags
from flax import traverse_util

import quickstart
from adacm2_jax.inference.processor import Processor
from adacm2_jax.models.params import abstract_params, split_params
from adacm2_jax.port.store import open_ours
from adacm2_jax.runs.load import start_params
from adacm2_jax.runs.workdir import read_base
from adacm2_jax.sharding import make_mesh
from adacm2_jax.video.frames import probe, read_clip
from adacm2_jax.video.sampling import Sampling
from data.jsonl import JsonlSource
from data.needle.render import ask
from tests.data.test_needle import asked_in, colours_of


@pytest.fixture
def given_flags(monkeypatch):
    """The script's flags, at their defaults."""
    values = flags.FlagValues()
    quickstart.define_flags(values)
    values.mark_as_parsed()
    monkeypatch.setattr(flags, "FLAGS", values)


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


def test_a_stage_that_is_done_is_left_as_it_is(tmp_path):
    for stage, settings in quickstart.needle.STAGES.items():
        done = tmp_path / stage / "checkpoints" / str(settings.steps)
        done.mkdir(parents=True)
        quickstart.train_stage(stage, tmp_path)
        assert list((tmp_path / stage).rglob("*")) == [done.parent, done]


def test_the_vit_is_made_once_and_the_first_stage_starts_from_it(
    tmp_path, monkeypatch, given_flags
):
    monkeypatch.setattr(quickstart.needle, "VISION", quickstart.needle.VISION._replace(steps=2))
    quickstart.make_vision(tmp_path)
    made = read_base(tmp_path / "vision")
    assert "llm/norm/scale" in made["missing"] and "vision/cls_token" not in made["missing"]
    quickstart.make_vision(tmp_path)
    assert read_base(tmp_path / "vision") == made

    first = quickstart.experiment_of("first", tmp_path)
    abstract = abstract_params(first.model, first.optim.groups, make_mesh())
    params = start_params(first.init_from, first.model, abstract, first.init_missing, first.seed)
    stored = open_ours(tmp_path / "vision")[1]
    assert all(path.startswith("vision/") for path in stored.shapes)
    flat = traverse_util.flatten_dict(params, sep="/")
    for path in stored.shapes:
        np.testing.assert_array_equal(flat[path], stored.read(path))
    learned = split_params(abstract, first.optim.groups)[0]
    assert not any(path.startswith("vision/") for path in learned)
    Processor.load(tmp_path / "vision", first.model).questions([ask("red", 3, 4, "train")])


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
