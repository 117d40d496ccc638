"""Evaluations that are killed go on, and end as if nothing had happened."""

import dataclasses
import json
import subprocess
import sys

import jax
import pytest

from adacm2_jax.commands.evaluate import evaluate
from adacm2_jax.inference.processor import Processor
from adacm2_jax.runs.load import experiment_of, load_params, make_answerer
from adacm2_jax.runs.partial import PartialPredictions
from data.sources import open_source
from tests.small import ROOT, process_environment, quick_compilation

PARTIAL, PROGRESS = "predictions.partial.jsonl", "predictions.progress.jsonl"
#: eval.py in a process that is killed when half of its nth write is on disk.
KILLED = """
import json, os, runpy, signal, sys
from adacm2_jax.runs import partial

last, whole = int(sys.argv[1]), partial._append

def dying(path, values):
    global last
    last -= 1
    if not last:
        text = "".join(json.dumps(value) + "\\n" for value in values)
        with open(path, "a") as file:
            file.write(text[: len(text) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(path, values)

partial._append = dying
sys.argv = ["eval.py", *sys.argv[2:]]
runpy.run_path("eval.py", run_name="__main__")
"""


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def run(small_run):
    experiment = experiment_of(small_run)
    # Of two policies, one random; sampled, so that the random numbers must go on, too.
    experiment = dataclasses.replace(
        experiment,
        eval=dataclasses.replace(experiment.eval, policies=("adacm2", "random"), batch_size=2),
        generation=dataclasses.replace(experiment.generation, temperature=1.0),
    )
    processor = Processor.load(small_run, experiment.model)
    return experiment, load_params(experiment, small_run), processor


def answer(run, output, **fields):
    experiment = dataclasses.replace(run[0], **fields)
    source = open_source(experiment.data, "test")
    return evaluate(experiment, make_answerer(experiment, *run[1:]), source, output)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The predictions of an evaluation that nobody disturbed, and its results."""
    output = tmp_path_factory.mktemp("whole")
    results = answer(run, output)
    assert [path.name for path in sorted(output.iterdir())] == [
        "metrics.json",
        "predictions.jsonl",
    ]
    return (output / "predictions.jsonl").read_bytes(), results


def test_killed_twice_it_ends_with_the_same_file_bit_for_bit(run, whole, small_run, tmp_path):
    # Twelve questions in six batches: the header, then two writes a batch. First it dies within the
    # lines of the third batch; then (the header is written anew first) within a note of progress.
    for write, done in ((6, 4), (5, 6)):
        killed = subprocess.run(
            [
                *(sys.executable, "-c", KILLED, str(write), f"--workdir={small_run}"),
                *(f"--output={tmp_path}", "--config.eval.policies=('adacm2', 'random')"),
                *("--config.eval.batch_size=2", "--config.generation.temperature=1.0"),
            ],
            cwd=ROOT,
            env=process_environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert killed.returncode == -9, killed.stderr
        text = (tmp_path / PROGRESS).read_text()
        records = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        assert records[-1]["done"] == done and not (tmp_path / "predictions.jsonl").exists()
    results = answer(run, tmp_path)
    predictions, undisturbed = whole
    assert (tmp_path / "predictions.jsonl").read_bytes() == predictions
    assert results["policies"] == undisturbed["policies"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == [
        "metrics.json",
        "predictions.jsonl",
    ]


class Stopped(Exception):
    """Ends an evaluation."""


def stop_after(monkeypatch, batches):
    """An evaluation that ends with an error after so many batches."""
    add, left = PartialPredictions.add, [batches]

    def adding(self, *args):
        if not left[0]:
            raise Stopped
        left[0] -= 1
        add(self, *args)

    monkeypatch.setattr(PartialPredictions, "add", adding)


def test_it_goes_on_from_whatever_is_left_of_the_files(run, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 4)
        answer(run, tmp_path)
    partial, progress = tmp_path / PARTIAL, tmp_path / PROGRESS
    lines = progress.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    # The predictions' last batch is lost, the note of it is not: the one before it counts.
    partial.write_bytes(partial.read_bytes()[:-10])
    progress.write_bytes(b"".join(lines) + b'{"done": 10, "by')
    answer(run, tmp_path)
    assert "6 of 12 questions are answered; the rest follows" in capsys.readouterr().out
    assert (tmp_path / "predictions.jsonl").read_bytes() == whole[0]


def test_killed_at_the_very_end_nothing_is_answered_again(run, whole, tmp_path, monkeypatch):
    (tmp_path / "predictions.jsonl").write_bytes(whole[0])  # renamed, but the progress is there
    header = {"experiment": "x"}
    (tmp_path / PROGRESS).write_text(json.dumps(header) + "\n")
    partial = PartialPredictions(tmp_path, header)
    assert partial.done == 0  # nothing is known of it: all anew, and nothing is lost
    assert (tmp_path / "predictions.jsonl").read_bytes() == whole[0]
    record = {"done": 12, "batches": 6, "bytes": len(whole[0]), "failed": [], "seconds": 1.0}
    (tmp_path / PROGRESS).write_text(json.dumps(header) + "\n" + json.dumps(record) + "\n")
    partial = PartialPredictions(tmp_path, header)
    assert partial.done == 12 and len(partial.lines) == 24
    partial.finish()
    assert (tmp_path / "predictions.jsonl").read_bytes() == whole[0]
    assert not (tmp_path / PROGRESS).exists()


@pytest.mark.parametrize("what", ["experiment", "parameters", "split"])
def test_predictions_of_something_else_are_kept_under_a_number(
    run, tmp_path, monkeypatch, capsys, what
):
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 2)
        answer(run, tmp_path)
    left = (tmp_path / PARTIAL).read_bytes()
    experiment, params, processor = run
    if what == "experiment":
        run = (
            dataclasses.replace(
                experiment,
                generation=dataclasses.replace(experiment.generation, max_new_tokens=2),
            ),
            *run[1:],
        )
    elif what == "parameters":
        part = next(iter(params))
        changed = jax.tree.map(lambda leaf: leaf * 1.001, params[part])
        run = experiment, params | {part: changed}, processor
    else:
        run = (
            dataclasses.replace(experiment, eval=dataclasses.replace(experiment.eval, limit=8)),
            *run[1:],
        )
    answer(run, tmp_path)
    said = capsys.readouterr().err
    assert "kept under a number, and all is answered anew" in said and what in said
    assert (tmp_path / "predictions.partial.1.jsonl").read_bytes() == left
    count = len((tmp_path / "predictions.jsonl").read_text().splitlines())
    assert count == (16 if what == "split" else 24)


def test_idle_settings_do_not_matter(run, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_after(patched, 3)
        answer(run, tmp_path)
    experiment = run[0]
    answer(
        run,
        tmp_path,
        eval=dataclasses.replace(experiment.eval, workers=1),
        train=dataclasses.replace(experiment.train, steps=7),
    )
    assert (tmp_path / "predictions.jsonl").read_bytes() == whole[0]
