"""Which checkpoint of a run answers."""

import dataclasses
import json
import os
import shutil

import pytest

from adacm2_jax.commands import select
from adacm2_jax.errors import UserError
from adacm2_jax.runs.load import experiment_of, load_params
from adacm2_jax.runs.workdir import saved_steps
from tests.small import run_process


class Source(list):
    def fingerprint(self):
        return "these"


@pytest.fixture
def experiment(small_run):
    experiment = experiment_of(small_run)
    policies = ("adacm2", "random")
    return dataclasses.replace(
        experiment, eval=dataclasses.replace(experiment.eval, select="val", policies=policies)
    )


@pytest.fixture
def directory(small_run, tmp_path):
    """A run that has kept three steps."""
    kept = tmp_path / "run"
    shutil.copytree(small_run, kept)
    newest = saved_steps(kept)[-1]
    for step in (newest + 1, newest + 2):
        shutil.copytree(kept / "checkpoints" / str(newest), kept / "checkpoints" / str(step))
    for old in saved_steps(kept)[:-3]:
        shutil.rmtree(kept / "checkpoints" / str(old))
    return kept


@pytest.fixture
def evaluated(monkeypatch):
    """Stands for answering a split: accuracies by step; and the steps that were asked for."""
    asked = []
    accuracy = {}

    def evaluate(experiment, answerer, source, output, task=None):
        settings = experiment.eval
        asked.append((settings.step, settings.split, settings.policies, settings.select))
        figures = accuracy.get(settings.step)
        return {"policies": {"adacm2": {"accuracy": figures}}, "scores": {}}

    monkeypatch.setattr(select, "evaluate", evaluate)
    return asked, accuracy


def choose(experiment, directory, output):
    return select.choose_step(experiment, directory, lambda _: None, Source("abcd"), output)


def test_the_best_step_is_chosen_and_of_equals_the_first(
    experiment, directory, evaluated, tmp_path, capsys
):
    asked, accuracy = evaluated
    first, second, third = saved_steps(directory)
    accuracy |= {first: 0.25, second: 0.75, third: 0.75}
    assert choose(experiment, directory, tmp_path / "out") == second
    assert asked == [(step, "val", ("adacm2",), "") for step in (first, second, third)]
    said = capsys.readouterr()
    assert f"step {second}: 0.7500  chosen" in said.out and "warning" not in said.err
    noted = json.loads((tmp_path / "out" / "select" / "selection.json").read_text())
    assert noted["step"] == second and noted["split"] == "val"


def test_a_selection_goes_on_where_it_was_killed(experiment, directory, evaluated, tmp_path):
    asked, accuracy = evaluated
    first, second, third = saved_steps(directory)
    accuracy |= {first: 0.5, second: 0.25}
    with pytest.raises(UserError, match="no answer of it is known"):
        accuracy.clear()
        choose(experiment, directory, tmp_path)
    asked.clear()
    accuracy |= {first: 0.5, second: 0.25, third: 0.0}
    for path in (tmp_path / "select").glob("*"):
        path.unlink()
    assert choose(experiment, directory, tmp_path) == first
    asked.clear()
    assert choose(experiment, directory, tmp_path) == first and not asked
    # A checkpoint that has been written anew is asked anew, alone.
    os.utime(directory / "checkpoints" / str(third))
    accuracy[third] = 1.0
    assert choose(experiment, directory, tmp_path) == third
    assert [step for step, *_ in asked] == [third]


def test_to_choose_on_the_split_that_is_reported_is_said(
    experiment, directory, evaluated, tmp_path, capsys
):
    evaluated[1].update(dict.fromkeys(saved_steps(directory), 0.5))
    peeking = dataclasses.replace(experiment.eval, select=experiment.eval.split)
    choose(dataclasses.replace(experiment, eval=peeking), directory, tmp_path)
    assert "the split that is reported" in capsys.readouterr().err


def test_captions_are_compared_by_their_sum():
    names = ["BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "METEOR", "ROUGE_L", "CIDEr"]  # docs/tasks.md
    metrics = {name: {"value": 2.0**place} for place, name in enumerate(names)}
    results = {"policies": {"adacm2": {}}, "scores": {"adacm2": {"metrics": metrics}}}
    assert select.figure(results, "adacm2") == 8 + 16 + 32 + 64
    assert select.figure({"policies": {"adacm2": {"accuracy": None}}}, "adacm2") is None


def test_parameters_are_those_of_the_step(experiment, directory):
    """Of a step whose values were changed."""
    steps = saved_steps(directory)
    whole = dataclasses.replace(experiment, eval=dataclasses.replace(experiment.eval, select=""))
    one = dataclasses.replace(whole, eval=dataclasses.replace(whole.eval, step=steps[0]))
    assert load_params(one, directory).keys() == load_params(whole, directory).keys()
    shutil.rmtree(directory / "checkpoints" / str(steps[-1]))
    with pytest.raises(UserError, match=f"no checkpoint of step {steps[-1]}"):
        gone = dataclasses.replace(whole.eval, step=steps[-1])
        load_params(dataclasses.replace(whole, eval=gone), directory)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"step": 999, "select": ""}, "eval.step=999: .* has kept steps"),
        ({"step": 1, "select": "val"}, "eval.step=1 and eval.select=val: a step is named"),
    ],
)
def test_what_cannot_be_had_is_refused(experiment, directory, fields, said):
    settings = dataclasses.replace(experiment.eval, **fields)
    with pytest.raises(UserError, match=said):
        select.check(dataclasses.replace(experiment, eval=settings), directory)


def test_without_checkpoints_there_is_nothing_to_choose(experiment, tmp_path):
    with pytest.raises(UserError, match="is no run with checkpoints"):
        select.check(experiment, tmp_path)


def test_eval_chooses_and_says_what_it_chose(directory, tmp_path):
    steps = saved_steps(directory)
    output = tmp_path / "out"
    command = ["eval.py", f"--workdir={directory}", f"--output={output}"]
    done = run_process(*command, "--config.eval.select=train", "--config.eval.limit=4")
    assert done.returncode == 0, done.stderr
    noted = json.loads((output / "metrics.json").read_text())
    # All three hold the same values.
    assert (noted["step"], noted["chosen_on"]) == (steps[0], "train")
    assert f"step {steps[0]}: " in done.stdout and "chosen" in done.stdout
    wrong = run_process(*command, "--config.eval.step=999")
    assert wrong.returncode and "eval.step=999" in wrong.stderr.splitlines()[-1]
