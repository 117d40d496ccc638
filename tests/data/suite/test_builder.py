"""Test sets of the suite: the same bytes each time, resumed, and read as everybody's JSON lines."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from adacm2_jax.errors import DataError, UserError
from adacm2_jax.runs.data_config import DataConfig, SuiteTasks
from adacm2_jax.video.frames import probe, read_clip
from adacm2_jax.video.sampling import Sampling
from adacm2_jax.video.stream import by_video
from data.jsonl import JsonlSource
from data.sources import open_source
from data.suite import builder
from data.suite.__main__ import main
from data.suite.builder import build
from data.suite.drawn import DrawnClips
from data.suite.video import Kind

KINDS = [Kind("needle", "grounds", 8, 3), Kind("late", "film", 8, 2)]


def bytes_of(directory) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.*")}


def records(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("suite") / "set"
    assert build(directory, KINDS, "test", 3) == directory / "questions.jsonl"
    return directory


def test_a_set_is_read_as_json_lines_and_its_videos_once(built):
    source = JsonlSource(built / "questions.jsonl")
    assert len(source) == 3 * 3 + 3 * 2 and not source.missing_videos()
    groups = list(by_video(source))
    assert [len(asked) for _, asked in groups] == [3] * 3 + [2] * 3
    for kind, (_, asked) in zip([KINDS[0]] * 3 + [KINDS[1]] * 3, groups, strict=True):
        assert len({(each.video, each.group) for each in asked}) == 1
        assert len({each.question for each in asked}) == len(asked)
        assert {each.category for each in asked} == {kind.task}
    assert len(list((built / "videos").iterdir())) == 6


def test_records_know_more_of_the_same_lines(built):
    found, source = records(built), JsonlSource(built / "questions.jsonl")
    for record, example in zip(found, source, strict=True):
        assert (record["id"], record["question"]) == (example.id, example.question)
        assert record["chance"] == 0.1 and record["num_frames"] == 8
        late = record["task"] == "late"
        assert (record["when"], record["style"]) == (
            ("late", "film") if late else ("before", "grounds")
        )
        assert record["reading"] == ("" if late else record["question"])
        assert record["age"] == 7 - record["frames"][-1]


def test_generic_questions_are_read_with_a_generic_prompt():
    kind = Kind("generic", "grounds", 16, 2)
    found = [record for number in range(4) for record in builder.records_of(kind, "val", number)]
    assert {(r["when"], r["reading"]) for r in found} == {("generic", "describe the video")}
    assert sum("changed" in record["question"] for record in found) == len(found) / 2


def test_videos_are_h264_and_show_what_was_drawn(built):
    for kind in KINDS:
        record = next(r for r in records(built) if r["task"] == kind.task)
        path = built / record["video"]
        info = probe(path)
        assert (info.codec, info.width, info.height) == ("h264", 64, 64)
        assert info.duration == pytest.approx(8) and info.fps == pytest.approx(1)
        read = read_clip(str(path), Sampling("uniform", num_frames=8), size=64).astype(float)
        assert np.abs(read - kind.frames("test", 0, 64)).mean() < 5  # of 255: H.264 at crf 18


def test_another_build_has_the_same_bytes(built, tmp_path):
    build(tmp_path / "again", KINDS, "test", 3)
    assert bytes_of(tmp_path / "again") == bytes_of(built)


def test_processes_write_the_same_bytes(built, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "_FEW_FRAMES", 0)
    build(tmp_path / "together", KINDS, "test", 3, shown=False)
    assert bytes_of(tmp_path / "together") == bytes_of(built)


def test_a_build_that_was_stopped_goes_on(built, tmp_path, monkeypatch):
    directory = tmp_path / "set"

    def stop(path, *arguments):
        if len(list((directory / "videos").iterdir())) == 2:
            raise KeyboardInterrupt
        write(path, *arguments)

    write = builder._write_video
    monkeypatch.setattr(builder, "_write_video", stop)
    with pytest.raises(KeyboardInterrupt):
        build(directory, KINDS, "test", 3)
    assert not (directory / "questions.jsonl").exists()
    times = {path: path.stat().st_mtime_ns for path in (directory / "videos").iterdir()}
    assert len(times) == 2
    monkeypatch.setattr(builder, "_write_video", write)
    build(directory, KINDS, "test", 3)
    assert bytes_of(directory) == bytes_of(built)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_what_is_done_is_not_done_again(built, monkeypatch):
    monkeypatch.setattr(builder, "_write_video", None)
    before = bytes_of(built)
    build(built, KINDS, "test", 3)
    assert bytes_of(built) == before


def test_another_set_in_the_same_directory_is_refused(built):
    for arguments in ((KINDS, "test", 4), (KINDS, "val", 3), (KINDS[:1], "test", 3)):
        with pytest.raises(DataError, match=r"holds another set \(see built\.json there\)"):
            build(built, *arguments)


def test_splits_have_other_videos(built, tmp_path):
    build(tmp_path / "val", KINDS, "val", 3)
    mine, other = bytes_of(built), bytes_of(tmp_path / "val")
    videos = [{v for name, v in each.items() if name.endswith("mp4")} for each in (mine, other)]
    assert len(videos[0]) == len(videos[1]) == 6 and not videos[0] & videos[1]


def test_sets_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(DataError, match="split 'exam' is unknown; there are train, val, test"):
        build(tmp_path / "a", KINDS, "exam", 3)
    with pytest.raises(DataError, match="videos = 0"):
        build(tmp_path / "a", KINDS, "test", 0)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="no set can be written there"):
        build(tmp_path / "file" / "set", KINDS, "test", 1)


def test_an_experiment_opens_its_splits(tmp_path):
    suite = SuiteTasks(("needle", "order"), ("grounds",), 8, 10, 2, 2)
    data = DataConfig(source="suite", suite=suite, data_dir=str(tmp_path))
    drawn = open_source(data, "train")
    assert isinstance(drawn, DrawnClips) and len(drawn) == 10
    assert {example.category for example in drawn} == {"needle", "order"}
    for split in ("val", "test"):
        source = open_source(data, split)
        assert isinstance(source, JsonlSource) and len(source) == 2 * 2 * 2
        assert source[0].id.startswith(f"{split}-needle-grounds-t8-")
    longer = dataclasses.replace(data, suite=dataclasses.replace(suite, num_frames=9))
    assert open_source(longer, "test").path != open_source(data, "test").path
    with pytest.raises(DataError, match=r"split 'exam' is unknown; data\.suite has train, val"):
        open_source(data, "exam")
    with pytest.raises(DataError, match=r"data\.data_dir is empty"):
        open_source(dataclasses.replace(data, data_dir=""), "test")


def test_the_command_builds_sets_and_sheets(tmp_path, capsys):
    options = ["--frames", "8", "--videos", "1", "--split", "val", "--sheet"]
    output = tmp_path / "set"
    tasks = ["--task", "order,count", "--style", "grounds,medical"]
    assert main(["--output", str(output), *tasks, *options]) == 0
    assert {record["category"] for record in records(output)} == {"order", "count"}
    assert {record["style"] for record in records(output)} == {"grounds", "medical"}
    assert len(list(output.glob("*.png"))) == 4
    assert str(output / "questions.jsonl") in capsys.readouterr().out
    shutil.rmtree(output)
    assert main(["--output", str(output), "--task", "sing", *options]) == 1
    assert "task 'sing' is unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, r"data\.suite\.tasks = \(\) must be names, such as \('needle',\)"),
        ({"styles": (1,)}, r"data\.suite\.styles = \(1,\) must be names, such as \('grounds',\)"),
        ({"ages": (1, 2.5)}, r"data\.suite\.ages = \(1, 2\.5\) must be whole numbers"),
        ({"questions_per_video": 0}, r"data\.suite\.questions_per_video = 0 must be at least 1"),
        ({"share": -0.5}, r"data\.suite\.share = -0\.5 must be at least 0"),
    ],
)
def test_fields_that_cannot_be_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        SuiteTasks(**changes)
