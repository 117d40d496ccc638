"""``adacm2 ablate``: a grid of evaluations, its tables and its going on."""

import csv
import json
import shutil

import numpy as np
import pytest

from adacm2_jax.commands.ablate import _check_metric, _right
from adacm2_jax.commands.ablate_report import age_bin, report, table
from adacm2_jax.errors import UserError
from adacm2_jax.tasks.task import find
from tests.small import error_line, run_script
from tests.video.make_videos import encode, numbered_frames

GRID = ("--memory", "adacm2", "--memory", "last=recent_frames:recent_frames=1", "--memory", "full")


def rows_of(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def grid(small_run, data_dir, tmp_path_factory):
    """Two lengths, three memories, of one run under two names."""
    root = tmp_path_factory.mktemp("grid")
    for name in ("one", "two"):
        shutil.copytree(small_run, root / name, symlinks=True)
    models = ("--model", root / "one", "--model", root / "two")
    place = ("--set", f"data.data_dir={data_dir}", "--output", root / "out")
    command = ("ablate", *models, *GRID, "--frames", "4,6", "--limit", 5, *place)
    assert run_script(*command) == 0
    return root, command


def test_every_answer_is_a_line_and_every_cell_an_interval(grid, small_run, data_dir, tmp_path):
    root, _ = grid
    answers, accuracy = (rows_of(root / "out" / f"{name}.csv") for name in ("answers", "accuracy"))
    assert len(answers) == 2 * 2 * 3 * 5 and len(accuracy) == 2 * 3
    for row in accuracy:
        own = [
            int(line["correct"])
            for line in answers
            if (line["T"], line["memory"]) == (row["T"], row["memory"])
        ]
        assert float(row["accuracy"]) == np.mean(own) and row["questions"] == "10"
        assert float(row["low"]) <= float(row["accuracy"]) <= float(row["high"])
        assert (row["videos"], row["runs"]) == ("5", "2")
    # The same as an evaluation by itself.
    flags = (f"--workdir={small_run}", f"--output={tmp_path}", f"--config.data.data_dir={data_dir}")
    lengths = ("--config.data.needle.num_frames=6", "--config.data.sampling.num_frames=6")
    policies = "--config.eval.policies=('adacm2','full')"
    assert run_script("eval.py", *flags, *lengths, policies, "--config.eval.limit=5") == 0
    lines = [json.loads(x) for x in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    for line in lines:
        same = [
            row["prediction"]
            for row in answers
            if (row["T"], row["memory"], row["id"]) == ("6", line["policy"], line["id"])
        ]
        assert same == [line["prediction"]] * 2
    text = (root / "out" / "report.md").read_text()
    assert "| memory | tokens | T = 4 | T = 6 |" in text and "| `last` | 0 |" in text


def test_a_grid_that_is_done_is_not_answered_again(grid, capsys):
    root, command = grid
    files = {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in (root / "out" / "cells").rglob("predictions.jsonl")
    }
    assert len(files) == 4
    assert run_script(*command) == 0
    assert "evaluate" not in capsys.readouterr().out
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files} == files
    # Another memory is answered, and what was there gets a number.
    assert run_script(*command, "--memory", "random") == 0
    assert len(list((root / "out" / "cells").rglob("predictions.1.jsonl"))) == 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--frames", "4,x"], "--frames 4,x must be whole numbers"),
        (["--vary", "data.colour=red"], "field data.colour is unknown"),
        (["--memory", "middle"], "policy 'middle' is unknown"),
        (["--set", "seed"], "--set seed must be FIELD=VALUE"),
        (["--tokens", "12"], "settles at 12 tokens"),
    ],
)
def test_what_cannot_be_is_said_before_parameters_are_read(
    small_run, tmp_path, capsys, monkeypatch, more, said
):
    def restore(*_, **__):
        raise AssertionError("parameters were read")

    monkeypatch.setattr("adacm2_jax.runs.load.restore_params", restore)
    command = ("ablate", "--model", small_run, *GRID, "--output", tmp_path / "out", *more)
    assert run_script(*command) == 2
    assert said in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_answers_of_a_benchmark_are_right_by_its_own_metric():
    task = find("msrvtt_qa")  # the first word counts
    line = {"id": "0", "question": "what?", "prediction": "tea with milk", "answer": "tea"}
    assert (_right(line, task), _right(line | {"answer": "milk"}, task)) == (1, 0)
    with pytest.raises(UserError, match="msvd_captions: a caption is not right or wrong"):
        _check_metric(find("msvd_captions"))


def test_videos_that_cannot_be_read_are_counted(small_run, tmp_path, capsys):
    good, bad = tmp_path / "good.mp4", tmp_path / "bad.mp4"
    encode(good, numbered_frames(8), fps=2)
    bad.write_bytes(b"no video")
    lines = [
        {"video": good.name, "question": "what?", "answer": "3", "id": "a"},
        {"video": good.name, "question": "what?", "id": "not known"},
        {"video": bad.name, "question": "what?", "answer": "3", "id": "b"},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = ("--set", "data.source=jsonl", "--set", f"data.jsonl.test={tmp_path / 'test.jsonl'}")
    command = ("ablate", "--model", small_run, "--memory", "adacm2", *source)
    assert run_script(*command, "--output", tmp_path / "out") == 1
    assert "1 questions left out: their videos could not be read" in capsys.readouterr().out
    assert [row["id"] for row in rows_of(tmp_path / "out" / "answers.csv")] == ["a"]


# --- Tables ---------------------------------------------------------------------------------------


def answer(memory, age, correct, video="a", **more):
    return dict(
        run="one",
        T=64,
        memory=memory,
        policy="adacm2",
        id="0",
        video=video,
        correct=correct,
        kept_tokens=11,
        total_tokens=1088,
        task="needle",
        age=age,
        chance=0.1,
        **more,
    )


def test_ages_are_in_bins_of_powers_of_four():
    bins = {0: "0", 1: "1-3", 3: "1-3", 4: "4-15", 15: "4-15", 16: "16-63", 255: "64-255"}
    assert {age: age_bin(age) for age in bins} == bins


def test_accuracy_by_age_leaves_out_what_has_none():
    rows = [answer("m", age, age < 4, video=str(age)) for age in (0, 1, 2, 5, 9)]
    rows.append(answer("m", "", 1))
    found = table(rows, by_age=True)
    assert [(row["age"], row["accuracy"], row["questions"]) for row in found] == [
        ("0", 1.0, 1),
        ("1-3", 1.0, 2),
        ("4-15", 0.0, 2),
    ]
    assert table(rows)[0]["questions"] == 6 and table(rows)[0]["chance"] == pytest.approx(0.1)
    assert "| `m` | 11 | " in report(table(rows), found)
    assert "| 0 frames ago | 1-3 frames ago | 4-15 frames ago |" in report(table(rows), found)
