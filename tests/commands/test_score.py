"""``adacm2 score``: figures of a file, without a model and without JAX."""

import json
import signal
import subprocess
import sys

import pytest

from adacm2_jax.scoring.report import score
from tests.small import ROOT, error_line, run_script

ROWS = [
    {
        "id": str(i),
        "video": f"{i // 2}.mp4",
        "question": "?",
        "policy": "adacm2",
        "prediction": "office" if i % 3 else "school",
        "n_best": [{"text": "hotel", "score": -1}, {"text": "office", "score": -2}],
        "answer": "office" if i % 2 else "hotel",
        "category": "p" if i < 4 else "q",
    }
    for i in range(12)
]


@pytest.fixture
def predictions(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_reader_that_has_gone_is_no_error(predictions):
    """As in ``adacm2 score … | head``: the other end is closed before anything is printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "adacm2_jax.commands", "score", predictions, "--metric", "top1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=120) == -signal.SIGPIPE
    assert said == ""


def test_figures_are_printed_and_written_without_importing_jax(predictions, tmp_path):
    program = (
        "import sys; sys.modules['jax'] = None; from adacm2_jax.commands.__main__ import main; "
        "main(['adacm2', *sys.argv[1:]])"
    )
    (tmp_path / "train.txt").write_text("hotel\nhotel\noffice\n")
    done = subprocess.run(
        [
            *(sys.executable, "-c", program, "score", str(predictions), "--task", "lvu_scene"),
            *("--train-answers", str(tmp_path / "train.txt")),
            *("--output", str(tmp_path / "figures.json")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["task"] == "lvu_scene"
    assert "warning: top5 needs the five best answers" in done.stderr  # some rows have fewer
    names = ["top1", "top1_by_video"]
    assert found["scores"] == score(ROWS, names, ["hotel", "hotel", "office"])
    top1 = found["scores"]["adacm2"]["metrics"]["top1"]
    # 1, 5, 7 and 11 say office and are; no other is right.
    assert top1["value"] == pytest.approx(4 / 12) and top1["videos"] == 6
    assert top1["train_constant"] == [0.5, "hotel"]
    lines = done.stdout.splitlines()
    assert lines[1].split()[:3] == ["adacm2", "top1", "33.3%"]
    assert "always 'hotel', as in training: 50.0%" in done.stdout
    assert any(line.split()[:1] == ["q"] for line in lines)


def test_a_metric_may_be_named_and_answers_be_json_lines(predictions, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"answer": "hotel"}\n{"answers": ["office"]}\n\n')
    given = ("--metric", "top5", "--metric", "first_word")
    command = ("score", predictions, *given, "--train-answers", tmp_path / "train.jsonl")
    assert run_script(*command) == 0
    words = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["adacm2", "top5", "100.0%"] in words and ["adacm2", "first_word", "33.3%"] in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.jsonl", "--task", "coin"], "gone.jsonl: no such file"),
        ([], "--task is missing: name the benchmark, or a --metric"),
        (["--task", "lvu"], "task 'lvu' is unknown"),
        (["--metric", "topp"], "metric 'topp' is unknown; there are captions"),
        (["--metric", "ranked"], "prediction 0 has no choice_log_probs"),
        (["--task", "coin", "--train-answers", "empty.txt"], "empty.txt: has no answers"),
        (["--task", "coin", "--output", "no/such/place.json"], "cannot be written"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    predictions, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    if not arguments or arguments[0].startswith("--"):
        arguments = [predictions.name, *arguments]
    assert run_script("score", *arguments) == 2
    assert message in error_line(capsys)


def test_what_is_no_prediction_is_named_by_its_line(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    for text, message in (
        ('{"id": "1"}', "line 1 is no prediction"),
        ("\n{", "line 2 is no prediction"),
        ("", "has no predictions"),
        (json.dumps(ROWS[0] | {"answer": None}), "no line has the right answer"),
    ):
        path.write_text(text)
        assert run_script("score", path, "--task", "coin") == 2
        assert message in error_line(capsys)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"answer": 5}, "line 1: answer is 5"),
        ({"prediction": None}, "line 1: prediction is None"),
        ({"answers": "tea"}, "line 1: answers is 'tea'"),
        ({"choices": [1, 2]}, "line 1: choices is"),
        ({"n_best": [1]}, "line 1: n_best is"),
        ({"choices": ["a", "b"], "choice_log_probs": [float("nan"), -1.0]}, "are no number"),
        ({"choices": ["a", "b"], "choice_log_probs": [-1.0]}, "are no number"),
    ],
)
def test_a_line_that_eval_does_not_write_is_named(tmp_path, capsys, fields, said):
    row = {"id": "q", "question": "?", "prediction": "a", "answer": "a"} | fields
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    assert run_script("score", tmp_path / "p.jsonl", "--metric", "ranked") == 2
    assert said in capsys.readouterr().err
