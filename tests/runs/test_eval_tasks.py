"""A split as a benchmark: a video's questions read together, lines that can be scored anew."""

import dataclasses
import json

import numpy as np
import pytest

from adacm2_jax.commands.evaluate import evaluate
from adacm2_jax.errors import UserError
from adacm2_jax.inference import steps
from adacm2_jax.inference.evaluate import table
from adacm2_jax.inference.processor import Processor
from adacm2_jax.runs.load import experiment_of, load_params, make_answerer, video_model
from adacm2_jax.scoring.report import score
from adacm2_jax.tasks.task import Task
from adacm2_jax.video import frames as video_frames
from adacm2_jax.video import stream
from data.jsonl import Example
from tests.small import QUESTION, quick_compilation
from tests.video.make_videos import encode, numbered_frames

QUESTIONS = [QUESTION, "what is shown?", "", "which colour?", "what is shown?"]
#: Of a choice that says nothing else; the tiny model knows digits alone.
CHOICES = ("1", "2", "7")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def run(small_run):
    experiment = experiment_of(small_run)
    return (
        experiment,
        load_params(experiment, small_run),
        Processor.load(small_run, experiment.model),
    )


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two videos, of 20 and of 50 frames, ten a second."""
    directory = tmp_path_factory.mktemp("clips")
    for count in (20, 50):
        encode(directory / f"{count}.mp4", numbered_frames(count), fps=10)
    return directory


def task(read=None, **fields) -> Task:
    return Task("trial", read or (lambda *_: []), ("test",), (), **fields)


def ask(clips, name, question=QUESTION, answer="1", number=0, **fields) -> Example:
    return Example(
        f"{name}-{number}", str(clips / f"{name}.mp4"), question, answer, None, None, **fields
    )


def answer(run, output, examples, task=None, generation=(), **settings) -> tuple[list[dict], dict]:
    """Lines of predictions and the results."""
    experiment, params, processor = run
    experiment = dataclasses.replace(
        experiment,
        eval=dataclasses.replace(experiment.eval, **settings),
        generation=dataclasses.replace(experiment.generation, **dict(generation)),
    )
    results = evaluate(
        experiment, make_answerer(experiment, params, processor), examples, output, task
    )
    text = (output / "predictions.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()], results


@pytest.fixture
def counted(monkeypatch):
    """Counts what is opened, and the frames that pass through the ViT."""
    counts = {"opened": 0, "chunks": 0}
    read_frames, encode_frames = video_frames.read_frames, steps.encode

    def opened(*args, **options):
        counts["opened"] += 1
        return read_frames(*args, **options)

    def encoded(*args):
        counts["chunks"] += 1
        return encode_frames(*args)

    monkeypatch.setattr(video_frames, "read_frames", opened)
    monkeypatch.setattr(steps, "encode", encoded)
    return counts


def test_twenty_captions_of_one_video_cost_one_decoding(run, clips, tmp_path, counted):
    captions = tuple(f"a caption {i}" for i in range(20))
    (line,), _ = answer(
        run, tmp_path, [ask(clips, "20", answer=captions[0], answers=captions)], limit=1
    )
    assert counted == {"opened": 1, "chunks": 2}  # four frames, three a chunk
    assert line["answers"] == list(captions) and line["correct"] is False


def test_so_do_twenty_questions_and_the_answers_are_those_of_each_alone(
    run, clips, tmp_path, counted
):
    questions = [QUESTIONS[i % 5] for i in range(20)]
    examples = [ask(clips, "20", text, number=i) for i, text in enumerate(questions)]
    policies = {"policies": ("adacm2", "random", "full")}
    together, _ = answer(run, tmp_path / "together", examples, **policies)
    assert counted == {"opened": 1, "chunks": 2}
    alone, _ = answer(run, tmp_path / "alone", examples[:5], batch_size=1, **policies)
    assert counted["opened"] == 2
    # The same five questions again and again; by policy, in the order of the examples.
    assert [line["id"] for line in together] == [example.id for example in examples] * 3
    for policy in range(3):
        mine = together[20 * policy : 20 * policy + 20]
        for i, line in enumerate(mine):
            other = alone[5 * policy + i % 5]
            assert line["question"] == other["question"] and line["policy"] == other["policy"]
            assert line["prediction"] == other["prediction"]
            assert line["score"] == pytest.approx(other["score"], abs=1e-5)
            assert line["kept_tokens"] == other["kept_tokens"]


def test_videos_with_more_and_fewer_questions_share_batches(
    run, clips, tmp_path, counted, monkeypatch
):
    counts = [("20", 1), ("50", 3), ("20", 2), ("50", 1), ("20", 9)]
    examples = [
        ask(clips, name, QUESTIONS[i % 5], number=10 * part + i)
        for part, (name, count) in enumerate(counts)
        for i in range(count)
    ]
    lines, _ = answer(run, tmp_path / "mixed", examples)  # 5 rows a batch
    assert [line["id"] for line in lines] == [example.id for example in examples]
    assert counted["opened"] == 5
    monkeypatch.setattr(stream, "MOST_QUESTIONS", 1)
    apart, _ = answer(run, tmp_path / "apart", examples, batch_size=1)
    assert counted["opened"] == 5 + len(examples)
    for line, other in zip(lines, apart, strict=True):
        assert line["id"] == other["id"]
        assert line["prediction"] == other["prediction"]
        assert line["score"] == pytest.approx(other["score"], abs=1e-5)
        assert line["frames"] == other["frames"]


def test_what_comes_after_the_question_is_not_read(run, clips, tmp_path):
    asked = [
        ask(clips, "50", number=0, at=2.0),
        dataclasses.replace(ask(clips, "50", number=1), end=2.0),
        ask(clips, "50", number=2),
        dataclasses.replace(ask(clips, "50", number=3), end=2.0, at=9.0),
    ]
    lines, _ = answer(run, tmp_path, asked)
    scores = [line["score"] for line in lines]
    assert scores[0] == scores[1] == scores[3] != scores[2]


def test_one_bad_video_fails_for_each_of_its_questions(run, clips, tmp_path):
    examples = [ask(clips, "gone", number=0), ask(clips, "gone", "why?", number=1)]
    lines, results = answer(run, tmp_path, [*examples, ask(clips, "20")])
    assert [row["id"] for row in results["failed"]] == ["gone-0", "gone-1"]
    assert [line["id"] for line in lines] == ["20-0"]


# --- tasks ----------------------------------------------------------------------------------------


def test_the_most_probable_choice_is_that_of_choose(run, clips, tmp_path):
    experiment, params, processor = run
    examples = [
        ask(clips, name, text, answer="2", number=i, choices=CHOICES, category=name)
        for name in ("20", "50")
        for i, text in enumerate(QUESTIONS[:2])
    ]
    ranked = task(metrics=("ranked", "ranked_per_token"), by="likelihood")
    lines, results = answer(run, tmp_path, examples, ranked)
    model = video_model(experiment, lambda: params, processor)
    for line, example in zip(lines, examples, strict=True):
        choices = model.choose(
            example.video, CHOICES, example.question, sampling=experiment.data.sampling
        )
        assert line["prediction"] == choices[0].label
        theirs = {choice.label: choice.log_likelihood for choice in choices}
        mine = dict(zip(line["choices"], line["choice_log_probs"], strict=True))
        assert mine == pytest.approx(theirs, abs=1e-5)
        _, targets = processor.candidates([""] * 3, CHOICES)
        assert line["choice_tokens"] == targets.sum(1).tolist() and "correct" not in line
    right = np.mean([line["prediction"] == "2" for line in lines])
    assert results["policies"]["adacm2"]["accuracy"] == right
    assert results["scores"]["adacm2"]["metrics"]["ranked"]["value"] == right
    assert "ranked" in table(results) and "20" in table(results)


def test_figures_come_out_again_from_the_lines_alone(run, clips, tmp_path):
    names = ["20", "20", "50", "50"]
    examples = [
        ask(clips, name, QUESTIONS[i % 2], answer=str(i), number=i, group=f"v{name}", category="c")
        for i, name in enumerate(names)
    ]
    beams = {"num_beams": 5, "num_return": 5}
    five = task(metrics=("top1", "top5", "top1_by_video"))
    lines, results = answer(run, tmp_path, examples, five, beams, policies=("adacm2", "recent"))
    assert score(lines, five.metrics) == results["scores"]
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["scores"] == results["scores"] and stored["task"] == "trial"
    entry = results["scores"]["recent"]["metrics"]["top5"]
    assert (entry["units"], entry["videos"]) == (4, 2)
    assert all(len(line["n_best"]) == 5 and line["group"] for line in lines)


def test_what_a_task_needs_is_looked_for_before_anything_is_answered(
    run, clips, tmp_path, capsys, counted, monkeypatch
):
    ranked = task(metrics=("ranked",), by="likelihood")
    with pytest.raises(UserError, match="task trial: 20-0 has no choices, which are to be ranked"):
        answer(run, tmp_path, [ask(clips, "20")], ranked)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="captions need Java 8"):
        answer(run, tmp_path, [ask(clips, "20")], task(metrics=("captions",)))
    assert counted["opened"] == 0
    _, results = answer(run, tmp_path, [ask(clips, "20")], task(metrics=("top1", "top5")))
    assert (
        "warning: top5 needs generation.num_return=5 (and as many num_beams), which is 1"
        in capsys.readouterr().err
    )
    assert list(results["scores"]["adacm2"]["metrics"]) == ["top1"]
