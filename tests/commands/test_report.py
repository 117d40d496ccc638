"""The command ``adacm2 report``: what it writes, what it refuses, and when."""

import json
import os
import sys

import pytest
from PIL import Image

import adacm2_jax
from adacm2_jax.commands.report import write_report
from adacm2_jax.inference.report import make_report
from tests.small import QUESTION, error_line, quick_compilation, run_script
from tests.video.make_videos import encode, numbered_frames


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "a <b> & clip.mp4"
    encode(path, numbered_frames(40), fps=2)
    return path


@pytest.fixture
def no_parameters(monkeypatch):
    def restore(*_, **__):
        raise AssertionError("parameters were read")

    monkeypatch.setattr("adacm2_jax.runs.load.restore_params", restore)


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


def test_a_page_and_a_picture_for_each_question_are_written(small_run, clip, tmp_path, capsys):
    command = ("report", clip, "--model", small_run, "--output", tmp_path / "out")
    assert run_script(*command, "--question", QUESTION, "--question", "what?") == 0
    lines = capsys.readouterr().out.splitlines()
    for start in (f"[adacm2] {QUESTION}", "[adacm2] what?", "[recent] what?"):
        assert any(line.startswith(start) for line in lines), lines
    assert lines[-3:] == [
        str(tmp_path / "out" / name) for name in ("report.html", "memory.png", "memory-2.png")
    ]
    text = (tmp_path / "out" / "report.html").read_text()
    assert "a &lt;b&gt; &amp; clip.mp4" in text and "<b> &" not in text
    assert text.count("<section>") == 3  # the last is what it costs
    for name in ("memory.png", "memory-2.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 500


def test_earlier_reports_stay_with_one_number_for_all_their_files(small_run, clip, tmp_path):
    command = ("report", clip, "--model", small_run, "--output", tmp_path)
    assert run_script(*command, "--question", QUESTION, "--question", "what?") == 0
    first = (tmp_path / "report.html").read_bytes()
    for _ in range(2):
        assert run_script(*command, "--question", QUESTION) == 0
    assert names(tmp_path) == [
        "memory-2.1.png",
        "memory.1.png",
        "memory.2.png",
        "memory.png",
        "report.1.html",
        "report.2.html",
        "report.html",
    ]
    assert (tmp_path / "report.1.html").read_bytes() == first


@pytest.mark.parametrize("policy", ["full", "recent", "random"])
def test_every_policy_has_a_report(small_run, clip, tmp_path, policy):
    command = ("report", clip, "--model", small_run, "--output", tmp_path, "--policy", policy)
    assert run_script(*command, "--question", QUESTION, "--num-frames", 4) == 0
    text = (tmp_path / "report.html").read_text()
    assert f"policy {policy}" in text
    assert ("no bound" in text) is (policy == "full")
    assert ("policy recent, " in text) is (policy != "full")
    assert names(tmp_path) == ["memory.png", "report.html"]


def test_under_merge_the_page_says_why_no_frame_is_drawn(small_run, clip, tmp_path, capsys):
    model = adacm2_jax.load(small_run, policy="merge", memory={"bank_frames": 2}, compare=True)
    study = model.study(clip, [QUESTION], sampling=adacm2_jax.Sampling("uniform", num_frames=4))
    paths = write_report(make_report(study, small_run), tmp_path)
    assert [path.name for path in paths] == names(tmp_path) == ["report.html"]
    assert "no memory.png: policy merge" in capsys.readouterr().err
    text = (tmp_path / "report.html").read_text()
    assert "None of them belongs to a frame" in text and "<image" not in text
    # Two frames of five means each, beside as many tokens that are the newest.
    assert "policy merge, 10 tokens" in text and "policy recent, 10 tokens" in text


def test_json_is_a_line_an_answer(small_run, clip, tmp_path, capsys):
    command = ("report", clip, "--model", small_run, "--output", tmp_path, "--json")
    assert run_script(*command, "--question", QUESTION) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["policy"] for line in lines] == ["adacm2", "recent"]


def test_without_matplotlib_there_is_a_page_alone(small_run, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ("report", clip, "--model", small_run, "--output", tmp_path)
    assert run_script(*command, "--question", QUESTION) == 0
    assert "no memory.png: matplotlib is missing" in capsys.readouterr().err
    assert names(tmp_path) == ["report.html"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--output", "{clip}"], ["clip.mp4", "nothing can be written"]),
        (["--fps", "0"], ["sampling.fps=0"]),
        (["--question", "why " * 40], ["the limit is 24"]),
    ],
)
def test_what_is_wrong_is_told_before_parameters_are_read(
    small_run, no_parameters, clip, tmp_path, capsys, given, words
):
    given = [word.replace("{clip}", os.fspath(clip)) for word in given]
    output = [] if "--output" in given else ["--output", tmp_path / "out"]
    question = [] if "--question" in given else ["--question", QUESTION]
    command = ("report", clip, "--model", small_run, *output, *question, *given)
    assert run_script(*command) == 2
    line = error_line(capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()
