"""Test sets of the suite: the same bytes each time, resumed, and read as everybody's JSON lines."""

import concurrent.futures.process
import dataclasses
import errno
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from adacm2_jax.errors import DataError, UserError
from adacm2_jax.runs.data_config import DataConfig, SuiteTasks
from adacm2_jax.video.frames import probe, read_clip
from adacm2_jax.video.sampling import Sampling
from adacm2_jax.video.stream import by_video
from data.jsonl import JsonlSource
from data.sources import check_source, open_source
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


def test_a_video_that_was_lost_is_drawn_again(built):
    before = bytes_of(built)
    lost = sorted((built / "videos").iterdir())[2]
    lost.unlink()
    build(built, KINDS, "test", 3)
    assert lost.exists() and bytes_of(built) == before


def test_a_set_of_which_nobody_can_tell_what_it_is_stays(tmp_path):
    (tmp_path / "built.json").write_text("{")
    with pytest.raises(DataError, match=r"built\.json is damaged \(.*\): remove the set, or name"):
        build(tmp_path, KINDS, "test", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["built.json"]


def test_a_killed_worker_is_said_in_one_line(tmp_path, monkeypatch):
    def killed(*_):
        raise concurrent.futures.process.BrokenProcessPool

    monkeypatch.setattr(builder, "_write_video", killed)
    with pytest.raises(DataError, match=r"was killed, .* the same command goes on where it was"):
        build(tmp_path / "set", KINDS, "test", 3)


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
    with pytest.raises(DataError, match="a set needs a task and a style"):
        build(tmp_path / "a", [], "test", 3)
    for size in (0, -2, 8, 57):
        with pytest.raises(DataError, match=f"size = {size} must be an even number of at least 16"):
            build(tmp_path / "a", KINDS, "test", 3, size)
    with pytest.raises(DataError, match=r"frames of a video need .* GB of memory"):
        build(tmp_path / "a", KINDS, "test", 3, 1_000_000)
    narrow = Kind("needle", "grounds", 8, 4, ages=(0, 0))
    with pytest.raises(DataError, match="have no room there"):
        build(tmp_path / "a", [*KINDS, narrow], "test", 3)
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


def test_what_cannot_be_opened_is_seen_without_making_data(tmp_path):
    suite = SuiteTasks(("needle",), ("grounds",), 8, 10, 2, 2)
    data = DataConfig(source="suite", suite=suite, data_dir=str(tmp_path / "data"))
    check_source(data, "test")
    for changes, said in (
        ({"tasks": ("needel",)}, "task 'needel' is unknown"),
        ({"styles": ("opera",)}, "style 'opera' is unknown"),
        ({"test_size": 0}, r"data\.suite\.test_size = 0 must be at least 1"),
    ):
        with pytest.raises(DataError, match=said):
            check_source(
                dataclasses.replace(data, suite=dataclasses.replace(suite, **changes)), "test"
            )
    with pytest.raises(DataError, match=r"data\.jsonl\.test is empty"):
        check_source(DataConfig(), "test")
    assert not (tmp_path / "data").exists()


def test_the_command_builds_sets_and_sheets(tmp_path, capsys):
    options = ["--frames", "8", "--videos", "1", "--split", "val", "--sheet"]
    output = tmp_path / "set"
    tasks = ["--task", "order,count", "--style", "grounds,medical"]
    assert main(["--output", str(output), *tasks, *options]) == 0
    assert {record["category"] for record in records(output)} == {"order", "count"}
    assert {record["style"] for record in records(output)} == {"grounds", "medical"}
    assert len(list(output.glob("*.png"))) == 4
    assert str(output / "questions.jsonl") in capsys.readouterr().out
    # A sheet shows no more videos than the set has.
    assert Image.open(next(output.glob("*.png"))).height < 200
    # Those of another seed stand beside it.
    another = ["--frames", "8", "--videos", "0", "--sheet", "--seed", "3"]
    assert main(["--output", str(output), *another]) == 0
    assert (output / "test-needle-grounds-t8-s3.png").exists()
    shutil.rmtree(output)
    assert main(["--output", str(output), "--task", "sing", *options]) == 1
    assert "task 'sing' is unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--task", ""], "--task is empty"),
        (["--style", ","], "--style is empty"),
        (["--videos", "0"], "--videos 0 makes sheets alone; add --sheet"),
        (["--videos", "-1"], "--videos -1 must be 0 or more"),
        (["--frames", "0"], "--frames 0 must be 1 or more"),
        (["--share", "nan"], "--share nan must be 0 or more"),
    ],
)
def test_a_command_that_would_make_nothing_is_refused(tmp_path, capsys, flags, said):
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(tmp_path / "set"), *flags])
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_ends_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    sheets = ["--frames", "8", "--videos", "0", "--sheet"]
    assert main(["--output", str(tmp_path / "file"), *sheets]) == 1
    assert "nothing can be written to" in capsys.readouterr().err

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def stopped(*_):
        raise KeyboardInterrupt

    for raised, status, said in (
        (full, 1, "--output .*: No space left on device"),
        (stopped, 130, "stopped by Ctrl-C; the same command goes on where it was"),
    ):
        monkeypatch.setattr("data.suite.__main__.write_sheet", raised)
        assert main(["--output", str(tmp_path / "set"), *sheets]) == status
        assert re.search(said, capsys.readouterr().err)


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
