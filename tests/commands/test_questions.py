"""``adacm2 questions``: a published annotation and the videos at hand as JSON lines."""

import json

import pytest

from data.jsonl import JsonlSource
from tests.small import error_line, run_script

LABELS = {"tt001": "office", "tt002": "school", "tt003": "hotel"}


@pytest.fixture
def benchmark(tmp_path):
    """LVU's annotation of three films, and the videos of two of them."""
    annotation = {
        video: {"duration": 120, "num_frames": 1500, "scene": label}
        for video, label in LABELS.items()
    }
    (tmp_path / "lvu").mkdir()
    (tmp_path / "lvu/test.json").write_text(json.dumps(annotation))
    (tmp_path / "videos/more").mkdir(parents=True)
    (tmp_path / "videos/tt001.mp4").touch()
    (tmp_path / "videos/more/tt002.MKV").touch()
    return tmp_path


def write(benchmark, *more: str) -> int:
    return run_script(
        *("questions", "lvu_scene", "--annotations", benchmark / "lvu"),
        *("--videos", benchmark / "videos", "--output", benchmark / "out.jsonl", *more),
    )


def test_the_questions_are_what_json_lines_take(benchmark, capsys):
    assert write(benchmark, "--skip-missing") == 0
    assert "4 questions, 2 left out: 1 videos missing" in capsys.readouterr().out
    source = JsonlSource(benchmark / "out.jsonl")
    assert not source.missing_videos()
    assert [example.id for example in source] == ["tt001_0", "tt001_20", "tt002_0", "tt002_20"]
    assert [example.answer for example in source] == ["office", "office", "school", "school"]
    assert source[1].question == "what is the scene of the movie?"
    assert (source[1].start, source[1].end, source[1].group) == (20.0, 119.1, "tt001")


def test_a_missing_video_is_named_before_anything_is_written(benchmark, capsys):
    assert write(benchmark) == 2
    assert "1 video(s) of lvu_scene are not there: tt003; --skip-missing" in error_line(capsys)
    assert not (benchmark / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    (
        (["--split", "dev"], "--split 'dev': lvu_scene has train, val, test"),
        (["--videos", "nowhere"], "--videos nowhere: no such directory"),
        (["--annotations", "nowhere"], "nowhere/test.json: no such file"),
    ),
)
def test_what_cannot_be_read_is_one_line(benchmark, capsys, arguments, told):
    assert write(benchmark, *arguments) == 2
    assert told in error_line(capsys)


def test_two_files_of_one_name_are_refused(benchmark, capsys):
    (benchmark / "videos/more/tt001.avi").touch()
    assert write(benchmark) == 2
    assert "two videos are tt001" in error_line(capsys)
