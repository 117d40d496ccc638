"""``adacm2 ablate``: a grid of evaluations, its tables and its going on."""

import argparse
import csv
import dataclasses
import json
import shutil
import types

import numpy as np
import pytest

from adacm2_jax.commands.ablate import _done, _records, _right
from adacm2_jax.commands.ablate_grid import (
    Place,
    _check_alike,
    cells_of,
    check_metric,
    labels_of,
)
from adacm2_jax.commands.ablate_report import age_bin, report, table, write
from adacm2_jax.errors import UserError
from adacm2_jax.tasks.task import find
from tests.small import error_line, run_script, small_experiment
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
    # Of a cell that lost some of its predictions all are answered, alike.
    before = (root / "out" / "answers.csv").read_bytes()
    lost, content = next((path, content) for path, (_, content) in files.items())
    lost.write_bytes(b"".join(content.splitlines(keepends=True)[:-2]))
    assert run_script(*command) == 0
    assert lost.read_bytes() == content and lost.with_name("predictions.1.jsonl").exists()
    lost.with_name("predictions.1.jsonl").unlink()
    assert (root / "out" / "answers.csv").read_bytes() == before
    assert not (root / "out" / "answers.1.csv").exists()
    # Another memory is answered, and what was there gets a number.
    assert run_script(*command, "--memory", "random") == 0
    assert len(list((root / "out" / "cells").rglob("predictions.1.jsonl"))) == 4
    assert (root / "out" / "answers.1.csv").read_bytes() == before


def test_a_cell_is_done_when_all_its_predictions_are_there(tmp_path):
    of = {"split": "test"}
    results = {"of": of, "policies": {"a": {"questions": 2}}, "failed": []}
    metrics, lines = tmp_path / "metrics.json", tmp_path / "predictions.jsonl"
    whole = json.dumps({"policy": "a"}) + "\n"
    metrics.write_text(json.dumps(results))
    for content, done in ((2 * whole, True), (whole, False), (whole + whole[:5], False)):
        lines.write_text(content)
        assert bool(_done(tmp_path, of)) == done
    lines.unlink()  # killed before predictions.partial.jsonl got its name
    assert _done(tmp_path, of) is None
    lines.write_text(2 * whole)
    assert _done(tmp_path, {"split": "val"}) is None
    for damaged in ("[]", "3", "{", json.dumps(results | {"policies": []})):
        metrics.write_text(damaged)
        assert _done(tmp_path, of) is None


def test_parameters_are_those_of_the_cell(small_run, data_dir, tmp_path):
    place = ("--set", f"data.data_dir={data_dir}", "--output", tmp_path)
    memory = ("--memory", "adacm2", "--limit", 1)
    vary = ("--vary", "eval.step=6,9")
    assert run_script("ablate", "--model", small_run, *memory, *vary, *place) == 0
    cells = list(tmp_path.rglob("metrics.json"))
    assert sorted(path.parent.name for path in cells) == ["step=6", "step=9"]
    of = [json.loads(path.read_text())["of"]["parameters"] for path in cells]
    assert of[0] != of[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--frames", "4,x"], "--frames 4,x must be whole numbers"),
        (["--frames", "4,4"], "--frames 4,4 has 4 2 times"),
        (["--frames", "4", "--set", "data.needle.num_frames=6"], "is set by --frames"),
        (["--set", "seed=1", "--set", "seed=2"], "--set seed is there twice"),
        (["--set", "seed=1", "--vary", "seed=2,3"], "--vary seed: --set gives it a value, too"),
        (["--set", "eval.policies=random"], "eval.policies is set by --memory"),
        (["--vary", "model.memory.decay=0.1,0.2"], "is set by --memory, for each memory"),
        (["--set", "model.llm.rope_theta=3.0"], "the model was not trained so"),
        (["--set", "eval.step=77"], "no checkpoint of step 77"),
        (["--set", "data.source=suite", "--set", "data.suite.tasks=needel"], "'needel' is unknown"),
        (["--set", "data.source=jsonl"], "data.jsonl.test is empty"),
        (["--output", "gs://bucket/grid"], "not an address in a bucket"),
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
        check_metric(find("msvd_captions"))


def changed(run, to, **fields):
    """A copy of a run, with other fields in its ``config.json``, by their paths."""
    shutil.copytree(run, to, symlinks=True)
    values = json.loads((to / "config.json").read_text())
    for path, value in fields.items():
        *parts, last = path.split("__")
        part = values
        for name in parts:
            part = part[name]
        part[last] = value
    (to / "config.json").write_text(json.dumps(values))
    return to


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model__memory__conserve_ratio": "0.2"}, "would not have the same memory adacm2"),
        ({"eval__split": "train"}, "would be asked otherwise (- eval.split = 'test' + eval.split"),
        ({"data__prompt": "{question}?"}, "would be asked otherwise (- data.prompt"),
    ],
)
def test_runs_of_which_there_is_no_one_accuracy_are_refused(
    small_run, data_dir, tmp_path, capsys, fields, said
):
    other = changed(small_run, tmp_path / "other", **fields)
    models = ("--model", small_run, "--model", other, "--memory", "adacm2", "--frames", 4)
    place = ("--set", f"data.data_dir={data_dir}", "--output", tmp_path / "out")
    assert run_script("ablate", *models, *place) == 2
    assert said in error_line(capsys)
    assert not (tmp_path / "out" / "cells").exists()


def test_models_may_have_videos_of_their_own():
    suite = small_experiment(data__source="suite")
    for field in ({"seed": 3}, {"train_size": 5}):
        own = dataclasses.replace(suite.data.suite, **field)
        other = dataclasses.replace(suite, data=dataclasses.replace(suite.data, suite=own))
        _check_alike(Place(suite, 4, {}), Place(other, 4, {}), "all: a and b")
    harder = dataclasses.replace(suite.data.suite, tasks=("order",))
    other = dataclasses.replace(suite, data=dataclasses.replace(suite.data, suite=harder))
    with pytest.raises(UserError, match=r"would be asked otherwise \(- data\.suite\.tasks"):
        _check_alike(Place(suite, 4, {}), Place(other, 4, {}), "all: a and b")


def test_runs_of_other_frames_are_refused():
    one = small_experiment()
    vision = dataclasses.replace(one.model.vision, image_size=42)
    other = dataclasses.replace(one, model=dataclasses.replace(one.model, vision=vision))
    with pytest.raises(UserError, match="all: a and b have 5 and 10 tokens a frame"):
        _check_alike(Place(one, 4, {}), Place(other, 4, {}), "all: a and b")


def test_runs_have_labels_of_their_own():
    assert labels_of(["/runs/0/main", "/runs/1/main/"]) == {
        "0_main": "/runs/0/main",
        "1_main": "/runs/1/main/",
    }
    assert list(labels_of(["/x/a/b_c", "/y/a_b/c"])) == ["x_a_b_c", "y_a_b_c"]
    assert list(labels_of(["/a/main", "/b/a/main"])) == ["a_main", "b_a_main"]
    assert labels_of(["/main"]) == {"main": "/main"}
    with pytest.raises(UserError, match="--model /runs/0/ is given twice"):
        labels_of(["/runs/0/", "/runs/1", "/runs/0"])


def cells(*vary, frames=None, split=None):
    given = dict(set=[], vary=list(vary), frames=frames, split=split, limit=0)
    return cells_of(argparse.Namespace(**given))


def test_fields_that_vary_have_columns_and_cells_of_their_own():
    found = cells("seed=1,2", "data.suite.seed=1,2", frames="4")
    assert [cell.shown for cell in found][1] == {"seed": 1, "data.suite.seed": 2}
    assert [cell.name for cell in found][1] == "T4,seed=1,data.suite.seed=2"
    # Nothing is called as a figure is.
    assert cells("data.task.videos=a,b")[0].shown == {"data.task.videos": "a"}
    long = "x" * 300
    names = [cell.name for cell in cells(f"data.prompt=a/b,a_b,{long}1,{long}2")]
    assert names[1] == "prompt=a_b" and len(set(names)) == 4 and max(map(len, names)) < 140


def test_what_is_known_of_questions_may_be_of_something_else(tmp_path):
    source = types.SimpleNamespace(path=str(tmp_path / "questions.jsonl"))
    assert _records(source) == {}
    records = tmp_path / "records.jsonl"
    records.write_text('[3]\n{"key": 1}\n\n{"id": "a", "task": "needle\u2028"}\n')
    assert _records(source)["a"]["task"] == "needle\u2028"
    records.write_text('{"id": "a"\n')
    with pytest.raises(UserError, match=r"records.jsonl is damaged \(.*\): build the set again"):
        _records(source)


def test_clips_that_are_drawn_in_training_are_refused(small_run, tmp_path, capsys):
    suite = ("--set", "data.source=suite", "--split", "train", "--output", tmp_path / "out")
    assert run_script("ablate", "--model", small_run, "--memory", "adacm2", *suite) == 2
    assert "split 'train' is drawn while it is trained on" in error_line(capsys)


def test_answers_that_nobody_knows_are_missed_before_any_is_given(small_run, tmp_path, capsys):
    line = {"video": "none.mp4", "question": "what?"}
    (tmp_path / "test.jsonl").write_text(json.dumps(line))
    source = ("--set", "data.source=jsonl", "--set", f"data.jsonl.test={tmp_path / 'test.jsonl'}")
    command = ("ablate", "--model", small_run, "--memory", "adacm2", *source)
    assert run_script(*command, "--output", tmp_path / "out") == 2
    assert "no question of split 'test' has a known answer" in error_line(capsys)
    assert not (tmp_path / "out" / "cells").exists()


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


def answer(memory, age, correct, video="a", T=64, **more):
    return dict(
        run="one",
        T=T,
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


def test_a_column_that_only_some_answers_have_parts_them():
    plain = {k: v for k, v in answer("m", "", 1).items() if k not in ("task", "age", "chance")}
    found = table([plain, answer("m", 1, 0), answer("m", 1, 1) | {"task": "order"}])
    assert [(row["task"], row["accuracy"]) for row in found] == [
        ("", 1.0),
        ("needle", 0.0),
        ("order", 1.0),
    ]


def test_groups_are_told_apart_by_what_varies():
    shown = ({"a": 1, "b": 1, "c": 2}, {"a": 1, "b": 2, "c": 2}, {"a": 1, "b": 2, "c": 1})
    rows = [answer("m", 1, 1, **more) for more in shown]
    text = report(table(rows), [])
    for more in shown:
        assert "## needle, " + ", ".join(f"{k} = {v}" for k, v in more.items()) in text
    assert "## needle\n" in report(table([answer("m", 1, 1, tasks="needle")]), [])


def test_chance_is_a_range_where_it_depends_on_the_length():
    rows = [answer("m", 1, 1, T=4) | {"chance": 1 / 3}, answer("m", 1, 1) | {"chance": 0.2}]
    assert "Chance: 20% to 33%." in report(table(rows), [])


def test_labels_are_shown_as_they_are_and_earlier_tables_stay(tmp_path, capfd, recwarn):
    labels = ("a|b", "$x^$", "_hidden", "../up, down", "漢字")
    rows = [answer(label, 1, 1) for label in labels]
    written = write(rows, tmp_path, "Models: one.")
    assert [path.name for path in written] == [
        *("answers.csv", "accuracy.csv", "ages.csv", "report.md", "accuracy.png", "ages.png")
    ]
    assert [row["memory"] for row in rows_of(tmp_path / "answers.csv")] == list(labels)
    text = (tmp_path / "report.md").read_text()
    assert "Models: one." in text and "| `a\\|b` | 11 |" in text
    assert not capfd.readouterr().err and not recwarn.list
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write(rows, tmp_path, "Models: one.")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    # Answers without an age leave no table of an earlier grid's ages.
    write([row | {"age": ""} for row in rows], tmp_path)
    assert not (tmp_path / "ages.csv").exists() and not (tmp_path / "ages.png").exists()
    assert (tmp_path / "answers.1.csv").read_bytes() == files["answers.csv"]
    assert (tmp_path / "ages.1.csv").read_bytes() == files["ages.csv"]
