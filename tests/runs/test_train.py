"""Training as a command: what it writes, and what it refuses."""

import json
import shutil

import jax
import numpy as np
import pytest

from adacm2_jax.config import from_dict
from adacm2_jax.inference.evaluate import table
from adacm2_jax.models.params import abstract_params, fresh_params, join_params, split_params
from adacm2_jax.runs.checkpoint import Checkpoints, restore_params
from adacm2_jax.runs.experiment import read
from adacm2_jax.runs.workdir import saved_steps
from adacm2_jax.sharding import make_mesh
from adacm2_jax.training.step import TrainState
from adacm2_jax.video.frames import read_clip
from adacm2_jax.video.resize import ma_lmm
from adacm2_jax.video.stream import video_batches
from benchmarks._runs import differences
from data.jsonl import Example
from data.training_set import clip_loader
from tests.small import (
    ROOT,
    STEPS,
    arguments,
    error_line,
    get_config,
    learned_of,
    rows_of,
    run_process,
    run_script,
)
from tests.video.make_videos import encode, numbered_frames

# --- what a run leaves ----------------------------------------------------------------------------


def test_a_run_writes_metrics_events_predictions_and_the_newest_checkpoints(small_run):
    rows = rows_of(small_run)
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1), STEPS]
    assert {"loss", "token_accuracy", "grad_norm", "grad_norm/qformer", "learning_rate"} <= set(
        rows[0]
    )
    assert set(rows[-1]) == {"step", "eval/adacm2/accuracy"}
    assert saved_steps(small_run) == [6, 9]
    events = [path.read_bytes() for path in small_run.glob("events.out.tfevents.*")]
    assert len(events) == 1 and b"loss" in events[0] and b"eval/adacm2/accuracy" in events[0]
    assert len((small_run / "predictions.jsonl").read_text().splitlines()) == 12
    metrics = json.loads((small_run / "metrics.json").read_text())
    assert metrics["policies"]["adacm2"]["questions"] == 12 and metrics["failed"] == []
    assert not [
        path for path in small_run.rglob("*") if "partial" in path.name or "tmp" in path.name
    ]


def test_the_loss_falls(compiled_once, data_dir, tmp_path):
    status = run_script(
        "train.py",
        *arguments(tmp_path, data_dir, train__steps=40, train__log_every=1, checkpoint__every=40),
        "--config.data.jitter=False",
        "--config.data.cache=True",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--config.optim.learning_rate=0.02",
    )
    losses = [row["loss"] for row in rows_of(tmp_path) if "loss" in row]
    assert status == 0 and np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_frozen_groups_keep_their_values_and_are_not_in_the_steps(small_run):
    config = get_config()
    model = from_dict(config.model.to_dict())
    abstract = abstract_params(model, config.optim.groups, make_mesh((-1, 1)))
    _, fresh = split_params(
        join_params(fresh_params(model, abstract, config.seed), {}), config.optim.groups
    )
    kept = learned_of(small_run)
    assert fresh and all(name.startswith("vision/") for name in fresh)
    for name, leaf in fresh.items():
        # The same numbers, compiled otherwise: a rounding apart. Nine steps would move them 0.01.
        np.testing.assert_allclose(np.asarray(leaf), kept[name], atol=3e-7, err_msg=name)
    stored = (small_run / "checkpoints" / "9" / "learned" / "_METADATA").read_text()
    assert "qformer/" in stored and '"vision/' not in stored


def test_evaluation_in_training_writes_its_accuracy_and_changes_nothing(
    small_run, data_dir, tmp_path
):
    command = arguments(tmp_path / "run", data_dir, eval__every=4, eval__limit=3)
    assert run_script("train.py", *command) == 0
    evaluated = [row["step"] for row in rows_of(tmp_path / "run") if "eval/adacm2/accuracy" in row]
    assert evaluated == [4, 8, 9]
    assert differences(small_run, tmp_path / "run") == []
    before = rows_of(tmp_path / "run")
    assert run_script("train.py", *command) == 0  # a finished run evaluates once more, no more
    assert rows_of(tmp_path / "run") == before


# --- NaN ------------------------------------------------------------------------------------------


def test_a_step_too_large_stops_the_run_and_says_where(compiled_once, data_dir, tmp_path, capsys):
    command = arguments(tmp_path / "run", data_dir, checkpoint__every=1)
    status = run_script("train.py", *command, "--config.optim.learning_rate=1e30")
    line = error_line(capsys)
    assert status == 2
    assert "error: step 3: " in line and "is not finite" in line
    assert "the newest checkpoint is 2" in line and "learning_rate" in line


def test_a_damaged_parameter_is_named(small_run, data_dir, tmp_path, capsys):
    config = get_config()
    groups = config.optim.groups
    abstract = abstract_params(from_dict(config.model.to_dict()), groups, make_mesh((-1, 1)))
    learned, frozen = split_params(join_params(restore_params(small_run, abstract), {}), groups)
    name = "qformer/query_tokens"
    learned[name] = learned[name].at[(0,) * learned[name].ndim].set(np.inf)
    shutil.copytree(small_run, tmp_path / "bad", ignore=shutil.ignore_patterns("checkpoints"))
    checkpoints = Checkpoints(tmp_path / "bad")
    checkpoints.save(TrainState(jax.numpy.int32(1), learned, frozen, {}), {"examples": 8})
    checkpoints.close()
    command = arguments(tmp_path / "run", data_dir, init_from=tmp_path / "bad")
    assert run_script("train.py", *command) == 2
    line = error_line(capsys)
    assert "error: step 1: " in line and f"the first is {name}" in line


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.train.batch_sise=3", ["batch_sise"]),
        ("--config.train.batch_size=three", ["train.batch_size", "three"]),
        ("--config.train.batch_size=0", ["train.batch_size = 0", "at least 1"]),
        ("--config.train.batch_size=500", ["48 training examples", "500", "batch_size"]),
        ("--config.train.num_frames=2", ["train.num_frames = 2", "data.sampling.num_frames"]),
        ("--config.data.source=tapes", ["data.source", "tapes", "needle"]),
        ("--config.data.needle.num_frames=2", ["data.needle.num_frames = 2", "3 and more"]),
        ("--config.data.prompt={q}", ["data.prompt", "{q}", "{question}"]),
        ("--config.data.sampling.mode=all", ["sampling.mode", "all", "uniform"]),
        ("--config.data.cache=True", ["data.cache", "data.jitter"]),
        ("--config.model.memory.recent_ratio=1.5", ["memory.recent_ratio", "[0, 1]", "1.5"]),
        ("--config.model.memory.conserve_ratio=-1", ["memory.conserve_ratio", "[0, 1]", "-1"]),
        ("--config.model.memory.conserve_ratio=1", ["conserve_ratio"]),
        ("--config.model.memory.policy=best", ["memory.policy", "best", "adacm2"]),
        ("--config.optim.groups=(('lm/.*', None), ('.*', 1.0))", ["optim.groups", "lm/.*", "llm"]),
        ("--config.mesh=(3, 1)", ["mesh = (3, 1)", "1 device"]),
        ("--config.generation.num_return=2", ["num_return", "num_beams"]),
        ("--config.tokenizers=nowhere", ["nowhere", "tokenizer"]),
        ("--config.model.dtype=float16", ["model.dtype", "bfloat16"]),
        ("--config.model.qformer_dtype=float16", ["model.qformer_dtype", "bfloat16"]),
        ("--config.init_from=nowhere", ["nowhere", "no checkpoint here"]),
        ("--config.eval.policies=()", ["eval.policies"]),
        (
            ("--config.data.sampling.mode=fps", "--config.eval.policies=('adacm2', 'full')"),
            ["eval.policies has 'full'", "'fps'", "eval.full_frames"],
        ),
        ("--workdri=x", ["workdri"]),
        ("extra", ["unexpected argument 'extra'"]),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(
    compiled_once, data_dir, tmp_path, capsys, override, words
):
    given = [override] if isinstance(override, str) else override
    status = run_script("train.py", *arguments(tmp_path / "run", data_dir), *given)
    line = error_line(capsys)
    assert status == 2
    for word in words:
        assert word in line, line
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_missing_configuration_or_flag_is_one_line(tmp_path, capsys):
    missing = tmp_path / "none.py"
    assert run_script("train.py", f"--config={missing}", f"--workdir={tmp_path}") == 2
    assert str(missing) in error_line(capsys)
    assert run_script("train.py", f"--workdir={tmp_path}") == 2
    assert "--config" in error_line(capsys)
    assert run_script("train.py", "--config=tests/small.py") == 2
    assert "--workdir" in error_line(capsys)


def test_an_address_in_a_bucket_is_no_directory(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = f"--config={ROOT / 'tests' / 'small.py'}"
    for command in (
        ("train.py", small, "--workdir=gs://bucket/run"),
        ("eval.py", "--workdir=gs://bucket/run"),
        ("eval.py", small, "--workdir=gs://bucket/run"),
        ("prepare", small, "--output=gs://bucket/run"),
    ):
        assert run_script(*command) == 2
        assert "=gs://bucket/run must be a directory" in error_line(capsys)
    assert not list(tmp_path.iterdir())


def test_as_a_process_an_error_has_a_status_and_no_traceback(compiled_once, tmp_path):
    command = ["train.py", "--config=tests/small.py", f"--workdir={tmp_path / 'run'}"]
    done = run_process(*command, "--config.model.memory.policy=best")
    assert done.returncode == 2 and "memory.policy" in error_line(done.stderr)
    done = run_process(*command, "--config.model.memory.policy=best", "--debug")
    assert done.returncode == 2 and "Traceback" in done.stderr and "\nerror: " in done.stderr


# --- own videos -----------------------------------------------------------------------------------


def write_lines(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def jsonl_arguments(tmp_path, train, test) -> list[str]:
    return [
        *arguments(tmp_path / "run", tmp_path, data__source="jsonl", train__steps=1),
        "--config.train.batch_size=2",
        f"--config.data.jsonl.train={train}",
        f"--config.data.jsonl.test={test}",
    ]


def test_own_videos_with_start_and_end_train_and_are_evaluated(compiled_once, tmp_path):
    encode(tmp_path / "clip.mp4", numbered_frames(40), fps=10)
    rows = [
        {"video": "clip.mp4", "question": "what is it?", "answer": "a", "start": 0, "end": 2},
        {"video": "clip.mp4", "question": "what is it?", "answer": "b", "start": 2.5},
        {"video": "gone.mp4", "question": "what is it?", "answer": "c"},
    ]
    write_lines(tmp_path / "train.jsonl", rows)
    write_lines(tmp_path / "test.jsonl", [{k: v for k, v in rows[0].items() if k != "answer"}])
    done = run_process(
        "train.py",
        f"--config=configs/videos.py:{tmp_path / 'train.jsonl'},{tmp_path / 'test.jsonl'}",
        f"--workdir={tmp_path / 'run'}",
        "--config.train.steps=1",
        "--config.train.batch_size=2",
    )
    assert done.returncode == 0, done.stderr
    assert "1 training videos are missing" in done.stderr and "gone.mp4" in done.stderr
    (line,) = [
        json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()
    ]
    assert line["frames"] == 8 and line["video"].endswith("clip.mp4") and "correct" not in line
    results = json.loads((tmp_path / "run/metrics.json").read_text())
    assert results["policies"]["adacm2"]["accuracy"] is None
    assert "-" in table(results)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"video": "clip.mp4", "answer": "a"}, ["line 2", "question", "missing"]),
        ({"video": "clip.mp4", "question": "what?"}, ["line 2", "answer", "missing"]),
        (
            {"video": "a", "question": "q " * 60, "answer": "a"},
            ["id 2", "62 tokens", "max_text_len"],
        ),
        (None, ["none of its videos is there", "gone.mp4"]),
    ],
)
def test_wrong_lines_are_found_before_anything_is_decoded(
    compiled_once, tmp_path, capsys, row, words
):
    good = {"video": "gone.mp4", "question": "what is it?", "answer": "b"}
    write_lines(tmp_path / "train.jsonl", [good, row or good])
    command = jsonl_arguments(tmp_path, tmp_path / "train.jsonl", tmp_path / "train.jsonl")
    assert run_script("train.py", *command) == 2
    line = error_line(capsys)
    for word in words:
        assert word in line, line


def test_training_and_evaluation_resize_frames_as_the_experiment_says(tmp_path):
    encode(tmp_path / "clip.mp4", numbered_frames(4), fps=4)
    config = get_config()
    config.data.jitter, config.data.resize = False, "ma_lmm"
    experiment = read(config)
    sampling = experiment.data.sampling
    native = read_clip(tmp_path / "clip.mp4", sampling, size=64)
    expected = [ma_lmm(frame, 28) for frame in native]
    example = Example("0", str(tmp_path / "clip.mp4"), "", None, None, None)
    batches = video_batches(
        [example],
        batch_size=1,
        chunk=4,
        size=28,
        workers=1,
        on_bad_video=lambda *_: None,
        sampling=sampling,
        resize=experiment.data.resize,
    )
    ((frames, _),) = next(batches).chunks
    np.testing.assert_array_equal(frames[0], expected)
    clip = clip_loader(experiment).random_map((0, example), np.random.default_rng(0))
    np.testing.assert_array_equal(clip["frames"], expected)
