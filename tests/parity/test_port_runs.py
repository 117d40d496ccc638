"""Converted checkpoints at work: eval.py answers with them, train.py starts from them."""

import json

import numpy as np
import pytest

from adacm2_jax.port.importer import import_checkpoint
from adacm2_jax.port.store import open_ours
from data.needle.render import draw_video, encode, load_digits, plan_video
from tests.parity import checkpoints
from tests.small import run_script

CONFIG = checkpoints.config()
EXPERIMENT = """
from configs.base import base_config
from tests.parity import checkpoints


def get_config(_=""):
    config = base_config(checkpoints.config())
    config.init_from = {weights!r}
    config.data.source = "needle"
    config.data.data_dir = {data!r}
    config.data.needle.num_frames = 3
    config.data.needle.train_size = 4
    config.data.needle.test_size = 2
    config.data.sampling.num_frames = config.train.num_frames = 3
    config.train.batch_size = 2
    config.train.steps = 1
    config.eval.batch_size = 2
    config.generation.max_new_tokens = 2
    return config
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    model = checkpoints.random_model(CONFIG)
    import_checkpoint([checkpoints.write_hugging_face(root / "hf", model)], root / "ours")
    return root / "ours"


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    file = tmp_path_factory.mktemp("video") / "clip.mp4"
    rng, (digits, labels) = np.random.default_rng(0), load_digits("test")
    file.write_bytes(encode(draw_video(plan_video(len(labels), 8, rng), digits, rng)))
    return file


@pytest.fixture
def experiment(weights, data_dir, tmp_path):
    file = tmp_path / "experiment.py"
    file.write_text(EXPERIMENT.format(weights=str(weights), data=str(data_dir)))
    return file


def ask(weights, video, output, *options) -> dict:
    status = run_script(
        "eval.py",
        f"--workdir={weights}",
        f"--video={video}",
        "--question=which digit was on the red ground?",
        f"--output={output}",
        *options,
    )
    assert status == 0
    (line,) = (output / "predictions.jsonl").read_text().splitlines()
    return json.loads(line)


def test_a_converted_checkpoint_answers_with_either_memory(weights, video, tmp_path, capsys):
    found = ask(weights, video, tmp_path / "one")
    assert found["policy"] == "adacm2" and isinstance(found["prediction"], str)
    base = json.loads((weights / "base.json").read_text())
    assert f"fingerprint {base['fingerprint']}" in capsys.readouterr().out
    memory = ("--config.eval.policies=('merge',)", "--config.model.memory.bank_frames=3")
    merged = ask(weights, video, tmp_path / "two", *memory)
    assert merged["policy"] == "merge"
    assert merged["kept_tokens"] == 3 * CONFIG.vision.tokens_per_frame


def test_training_starts_from_it(weights, experiment, tmp_path, capsys):
    workdir = tmp_path / "run"
    command = ["train.py", f"--config={experiment}", f"--workdir={workdir}"]
    assert run_script(*command) == 2
    assert "lacks 1 parameters of the model, the first is temporal_embed" in capsys.readouterr().err
    named = "--config.init_missing=('temporal_embed',)"
    # A rate of zero: what the run saves is what it started from.
    assert run_script(*command, named, "--config.optim.learning_rate=0.0") == 0
    assert "starts fresh: temporal_embed" in capsys.readouterr().out
    _, before = open_ours(weights)
    _, after = open_ours(workdir)
    assert set(after.shapes) == set(before.shapes) | {"temporal_embed"}
    for path in before.shapes:
        np.testing.assert_array_equal(after.read(path), before.read(path), err_msg=path)
    # Trained parts and frozen ones go back to PyTorch from a run as well.
    status = run_script(
        "eval.py",
        f"--config={experiment}",
        f"--workdir={tmp_path / 'new'}",
        named,
        f"--output={tmp_path / 'results'}",
    )
    assert status == 0


def test_an_experiment_with_another_model_is_refused(weights, experiment, tmp_path, capsys):
    status = run_script(
        "train.py",
        f"--config={experiment}",
        f"--workdir={tmp_path / 'run'}",
        "--config.model.vision.num_heads=4",
    )
    assert status == 2
    message = capsys.readouterr().err
    assert " - model.vision.num_heads = 16" in message
    assert " + model.vision.num_heads = 4" in message
