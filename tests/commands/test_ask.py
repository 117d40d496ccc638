"""The command adacm2 and the Python door: one video, its answers and what they rest on."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest

import adacm2_jax
from adacm2_jax.commands.ask import clock, clocks
from adacm2_jax.errors import DataError, UserError
from adacm2_jax.runs.lock import locked_output
from adacm2_jax.video.room import host_memory
from tests.small import (
    QUESTION,
    ROOT,
    error_line,
    process_environment,
    quick_compilation,
    run_script,
)
from tests.video.make_videos import encode, numbered_frames


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Twenty seconds, ten frames a second."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    encode(path, numbered_frames(200), fps=10)
    return path


@pytest.fixture
def no_parameters(monkeypatch):
    """Fails when parameters are read: what is cheap to find is found before."""

    def restore(*_, **__):
        raise AssertionError("parameters were read")

    monkeypatch.setattr("adacm2_jax.runs.load.restore_params", restore)


@pytest.fixture(scope="module")
def model(small_run):
    return adacm2_jax.load(small_run)


def test_a_video_is_read_at_one_frame_a_second(model, clip):
    reply = model.ask(clip, QUESTION)
    assert reply.video == str(clip) and reply.question == QUESTION
    assert reply.frames == 20 and reply.total_tokens == 100 and 0 < reply.kept_tokens < 10
    assert isinstance(reply.answer, str) and math.isfinite(reply.score)
    assert model.ask(clip, QUESTION, sampling=adacm2_jax.Sampling("fps", 0.5)).frames == 10


def test_an_answer_names_the_times_of_what_is_remembered(model, clip):
    reply = model.ask(clip, QUESTION, start=2.5, end=12.5, moments=100)
    times = [moment.time for moment in reply.moments]
    assert set(times) <= {2.5 + second for second in range(10)}
    assert 11.5 in times  # the newest frame is always seen whole, and its newest tokens stay
    tokens = [moment.tokens for moment in reply.moments]
    assert tokens == sorted(tokens, reverse=True) and min(tokens) > 0
    # No layer holds more than kept_tokens, and this model has one.
    assert sum(tokens) == reply.kept_tokens
    assert len(model.ask(clip, QUESTION, moments=1).moments) == 1


def test_several_questions_are_answered_in_one_pass(model, clip):
    questions = [QUESTION, "what is shown?"]
    replies = model.ask(clip, questions)
    assert [reply.question for reply in replies] == questions
    assert model.caption(clip, "what is it?").question == "what is it?"


def test_a_memory_that_holds_everything_names_no_moments(small_run, clip):
    reply = adacm2_jax.load(small_run, policy="full").ask(clip, QUESTION)
    assert reply.kept_tokens == reply.total_tokens == 100 and reply.moments == ()


def test_a_label_too_long_is_refused_before_the_video_is_read(model):
    with pytest.raises(UserError, match=r"'1 2 3 4 5 6' has .* tokens.*the limit is 4"):
        model.choose("gone.mp4", ["1", "1 2 3 4 5 6"])


def test_labels_are_ranked_by_likelihood(model, clip):
    labels = ["1", "2", "a"]
    choices = model.choose(clip, labels, QUESTION)
    assert {choice.label for choice in choices} == set(labels)
    scores = [choice.log_likelihood for choice in choices]
    assert scores == sorted(scores, reverse=True) and max(scores) < 0
    assert sum(choice.probability for choice in choices) == pytest.approx(1)
    shares = np.exp(np.array(scores) - scores[0])
    assert [c.probability for c in choices] == pytest.approx(list(shares / shares.sum()))
    with pytest.raises(UserError, match=r"labels are \['a'\]: give at least two"):
        model.choose(clip, ["a"])


def test_bad_input_is_named(model, small_run, clip, tmp_path):
    with pytest.raises(DataError, match=r"gone\.mp4: no such file"):
        model.ask(tmp_path / "gone.mp4", QUESTION)
    with pytest.raises(UserError, match="the limit is 24"):
        model.ask(tmp_path / "gone.mp4", "why " * 40)
    with pytest.raises(UserError, match="questions are empty"):
        model.ask(clip, [])
    with pytest.raises(UserError, match="a question is no text at character 3"):
        model.ask(clip, "o\u00f9\udce9")
    with pytest.raises(UserError, match=r"memory\.ratio is unknown"):
        adacm2_jax.load(small_run, memory={"ratio": 1})
    for place in (tmp_path, small_run / "config.json"):
        with pytest.raises(UserError, match=r"no config\.json here"):
            adacm2_jax.load(place)
    with pytest.raises(UserError, match=r"dtype is 'float64'"):
        adacm2_jax.load(small_run, dtype="float64")
    with pytest.raises(UserError, match=r"labels are one text, '12'"):
        model.choose(clip, "12")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m, clip: m.ask(clip, None), "questions is None; give a list of texts"),
        (lambda m, clip: m.ask(clip, 3), "questions is 3; give a list of texts"),
        (lambda m, clip: m.ask(clip, b"why"), "questions are b'why'; give a list of texts"),
        (lambda m, clip: m.ask(clip, ["a", None]), "one of questions is None; give a text"),
        (lambda m, clip: m.caption(clip, {"a": 1}), "questions are {'a': 1}; give a list of texts"),
        (lambda m, clip: m.ask(None, QUESTION), "video is None; give the path of a video file"),
        (lambda m, clip: m.ask(b"a.mp4", QUESTION), "video is b'a.mp4'; give the path of a video"),
        (lambda m, clip: m.ask("", QUESTION), "video is ''; give the path of a video file"),
        (
            lambda m, clip: m.ask(clip, QUESTION, start="1"),
            "start is '1'; give seconds as a number",
        ),
        (lambda m, clip: m.ask(clip, QUESTION, end=True), "end is True; give seconds as a number"),
        (
            lambda m, clip: m.ask(clip, QUESTION, sampling=2),
            "sampling is 2; give an adacm2_jax.Sam",
        ),
        (lambda m, clip: m.ask(clip, QUESTION, moments=None), "moments is None; give a whole"),
        (lambda m, clip: m.ask(clip, QUESTION, moments=-1), "moments is -1; give a whole number"),
        (lambda m, clip: m.choose(clip, None), "labels is None; give a list of texts"),
        (lambda m, clip: m.choose(clip, ["a", 2]), "one of labels is 2; give a text"),
        (lambda m, clip: m.choose(clip, ["a", " "]), "labels are ['a', ' ']: one is empty"),
        (lambda m, clip: m.choose(clip, ["a", "b"], None), "a question is None; give a text"),
    ],
)
def test_a_wrong_type_is_told_with_the_argument_and_its_value(model, clip, ask, message):
    with pytest.raises(UserError) as error:
        ask(model, clip)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"directory": None}, "directory is None; give the directory of a run"),
        ({"directory": b"runs"}, "directory is b'runs'; give the directory"),
        ({"directory": ""}, "directory is ''; give the directory"),
        ({"policy": None}, "policy is None; give a text"),
        ({"dtype": np.float32}, "dtype is <class 'numpy.float32'>; give a text"),
        ({"on_truncated": True}, "on_truncated is True; give a text"),
        ({"memory": [1]}, "memory is [1]; give a dictionary"),
        ({"memory": {"capacity": "9"}}, "memory.capacity must be int, not '9'"),
        ({"generation": "beams"}, "generation is 'beams'; give a dictionary"),
        ({"generation": {"num_beams": "5"}}, "generation.num_beams must be int, not '5'"),
        ({"mesh": 2}, "mesh is 2; give two whole numbers"),
        ({"mesh": (1, 1, 1)}, "mesh is (1, 1, 1); give two whole numbers"),
        ({"mesh": (1, "1")}, "one of mesh is '1'; give a whole number"),
    ],
)
def test_a_model_that_cannot_be_meant_is_told(small_run, given, message):
    with pytest.raises(UserError) as error:
        adacm2_jax.load(**({"directory": small_run} | given))
    assert str(error.value).startswith(message)


def test_a_memory_that_holds_everything_is_refused_where_it_cannot(small_run, clip):
    model = adacm2_jax.load(small_run, policy="full")
    # 20 bytes a token and layer at least: five tokens a frame.
    frames = host_memory() // 100
    with pytest.raises(UserError, match=f"tokens of {frames:,} frames under policy 'full' need"):
        model.ask(clip, QUESTION, sampling=adacm2_jax.Sampling("uniform", num_frames=frames))


def test_the_command_answers_from_any_directory(small_run, clip, tmp_path):
    command = [sys.executable, "-m", "adacm2_jax.commands", "ask", clip, "--model", small_run]
    done = subprocess.run(
        [*command, "--question", QUESTION, "--question", "what?", "--output", "out"],
        cwd=tmp_path,
        env=process_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(QUESTION) and lines[2].startswith("what?")
    assert "20 frames read" in lines[1] and "remembered most: 0:" in lines[1]
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["question"] for row in rows] == [QUESTION, "what?"]
    assert {"id", "prediction", "score", "moments", "kept_tokens", "policy"} <= set(rows[0])
    assert "answer" not in rows[0]  # the right one, which nobody has given


def test_json_is_a_line_an_answer_and_earlier_files_stay(small_run, clip, tmp_path, capsys):
    command = ("ask", clip, "--model", small_run, "--question", QUESTION, "--json")
    for _ in range(2):
        assert run_script(*command, "--output", tmp_path) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 and lines[0] == lines[1]
    assert sorted(path.name for path in tmp_path.glob("predictions*")) == [
        "predictions.1.jsonl",
        "predictions.jsonl",
    ]


def test_labels_on_the_command_line(small_run, clip, capsys):
    command = ("choose", clip, "--model", small_run, "--label", "1", "--label", "2")
    assert run_script(*command, "--question", QUESTION) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("%" in line for line in lines)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--fps", "0"], ["sampling.fps=0"]),
        (["--start", "99"], ["clip.mp4", "start=99"]),
        (["--num-frames", "0"], ["num_frames=0"]),
        (["--output", "{clip}"], ["clip.mp4", "nothing can be written"]),
        (["--output", ""], ["--output is empty; give a text"]),
        (["--question", " "], ["--question is empty; give a text"]),
        (["--model", ""], ["--model is empty; give a text"]),
        (["--start", "2", "--end", "2"], ["start=2 s and end=2 s leave nothing to read"]),
        (["--fps", "1e12"], ["clip.mp4", "20,000,000,000,000 frames", "GB", "lower --fps"]),
    ],
)
def test_wrong_flags_are_one_line(small_run, clip, capsys, given, words):
    given = [word.replace("{clip}", str(clip)) for word in given]
    status = run_script("ask", clip, "--model", small_run, "--question", QUESTION, *given)
    line = error_line(capsys)
    assert status == 2
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--fps", "nan"], "sampling.fps=nan"),
        (["--num-frames", "0"], "num_frames=0"),
        (["--start", "5", "--end", "3"], "start=5 s is not before end=3 s"),
        (["--question", "why " * 20_000], "the limit is 24"),
        (["{gone}"], "gone.mp4: no such file"),
    ],
)
def test_what_is_asked_is_looked_at_before_parameters_are_read(
    small_run, no_parameters, clip, tmp_path, capsys, given, message
):
    video = tmp_path / "gone.mp4" if given == ["{gone}"] else clip
    given = [] if given == ["{gone}"] else given
    command = (video, "--model", small_run)
    output = tmp_path / "out"
    question = [] if "--question" in given else ["--question", QUESTION]
    assert run_script("ask", *command, *question, "--output", output, *given) == 2
    assert message in error_line(capsys)
    assert not output.exists()
    if "--question" not in given:
        assert run_script("caption", *command, *given) == 2
        assert message in error_line(capsys)
    choose = ("choose", *command, "--label", "1", "--label", "2")
    assert run_script(*choose, *given) == 2
    assert message in error_line(capsys)


def test_a_label_that_is_too_long_is_refused_before_parameters_are_read(
    small_run, no_parameters, clip, capsys
):
    command = ("choose", clip, "--model", small_run, "--label", "1")
    assert run_script(*command, "--label", "1 " * 50) == 2
    assert "1 1 1" in error_line(capsys)
    with pytest.raises(AssertionError, match="parameters were read"):
        run_script(*command, "--label", "2")


def test_a_run_without_parameters_is_refused_when_it_is_opened(small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(UserError, match="no checkpoint here"):
        adacm2_jax.load(tmp_path / "run")


def test_an_output_that_another_process_writes_to_is_refused(
    small_run, no_parameters, clip, tmp_path, capsys
):
    """Before a parameter is read; both would give their predictions the same name."""
    command = ("ask", clip, "--model", small_run, "--question", QUESTION, "--output")
    with locked_output(tmp_path):
        assert run_script(*command, tmp_path) == 2
    line = error_line(capsys)
    assert f"{tmp_path}: another process is writing there" in line and "--output" in line


@pytest.mark.parametrize("words", [["--help"], ["ask", "--help"], ["choose", "-h"]])
def test_help_needs_no_jax(words):
    program = (
        "import sys; from adacm2_jax.commands.__main__ import main\n"
        "try: main(['adacm2', *sys.argv[1:]])\n"
        "except SystemExit as done: assert not done.code; assert 'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage: adacm2" in done.stdout


def test_importing_the_package_is_quick_and_imports_nothing():
    program = (
        "import sys, time; before, begun = set(sys.modules), time.perf_counter()\n"
        "import adacm2_jax\n"
        "print({name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "adacm2_jax" in done.stdout
    for heavy in ("jax'", "flax", "numpy", "av'"):
        assert heavy.replace("'", "") + "'" not in done.stdout.replace("adacm2_jax'", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.04, "0:07"), (67.25, "1:07.2"), (3723, "1:02:03")]
)
def test_times_are_for_people(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("times", "texts"),
    [
        ([], []),
        ([7.04, 67.25], ["0:07", "1:07.2"]),
        ([1.01, 1.02, 1.03], ["0:01.01", "0:01.02", "0:01.03"]),
        ([1.5, 1.51, 1.5], ["0:01.5", "0:01.51"]),
        ([2.0, 2.0004], ["0:02", "0:02.0004"]),
        ([1.0, 1.0 + 1e-9], ["0:01"]),
    ],
)
def test_different_times_look_different(times, texts):
    assert clocks(times) == texts
