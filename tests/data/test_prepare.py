"""Features computed once: the same losses as from pixels, shards that survive anything."""

import json
import signal
import socket
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adacm2_jax.config import from_dict
from adacm2_jax.errors import UserError
from adacm2_jax.inference.encoder import fingerprint
from adacm2_jax.models.adacm2 import Question
from adacm2_jax.models.params import abstract_params, join_params, param_shapes
from adacm2_jax.models.vit import VisionTransformer
from adacm2_jax.runs.checkpoint import restore_params
from adacm2_jax.runs.load import vision_params
from adacm2_jax.sharding import make_mesh
from adacm2_jax.training.step import Batch, StepConfig, images_at_a_time, loss_fn, refuse_learning
from data.feature_cache.cache import read_manifest
from tests.distributed.conftest import free_port, start
from tests.small import ROOT, error_line, get_config, process_environment, run_script, small_model


def arguments(data_dir, **values) -> list[str]:
    given = {"data__data_dir": data_dir, "data__jitter": False, "model__dtype": "bfloat16"}
    given |= {"train__steps": 10, "eval__limit": 2} | values
    return [
        "--config=tests/small.py",
        *(f"--config.{name.replace('__', '.')}={value}" for name, value in given.items()),
    ]


def prepare(*command: object) -> int:
    return run_script("prepare", *command)


def shards(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("features-*")}


def losses(workdir) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def prepared(compiled_once, data_dir, tmp_path_factory):
    """The features of 48 videos of four frames, in eight shards. Tests must not change it."""
    output = tmp_path_factory.mktemp("features") / "bfloat16"
    assert prepare(*arguments(data_dir), f"--output={output}") == 0
    return output


@pytest.fixture(scope="module")
def from_pixels(compiled_once, data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "pixels"
    assert run_script("train.py", *arguments(data_dir), f"--workdir={workdir}") == 0
    return losses(workdir)


# --- the same numbers -----------------------------------------------------------------------------


def test_training_from_features_has_the_losses_of_pixels_bit_by_bit(
    prepared, from_pixels, data_dir, tmp_path
):
    command = arguments(data_dir, data__features=prepared)
    assert run_script("train.py", *command, f"--workdir={tmp_path / 'run'}") == 0
    assert len(from_pixels) == 10 and losses(tmp_path / "run") == from_pixels


def test_int8_states_its_error(prepared, data_dir, tmp_path, capsys):
    output = tmp_path / "int8"
    assert prepare(*arguments(data_dir), f"--output={output}", "--dtype=int8", "--shards=3") == 0
    manifest = read_manifest(output)
    error = manifest["done"]["error"]
    assert 0 < error["largest"] <= (1 / 254 + 2**-8) * 1.01  # half a step, then bfloat16
    assert f"error {error['rms']:.2e} rms" in capsys.readouterr().out
    assert manifest["shards"] == 3 and len(shards(output)) == 3


@pytest.mark.parametrize(
    ("frames", "step", "shape"),
    [
        (4, StepConfig(chunk=16), (1, 1)),
        (7, StepConfig(chunk=3), (1, 1)),
        (6, StepConfig(chunk=3, accumulate=2), (1, 1)),
        (5, StepConfig("scan"), (1, 1)),
        (1, StepConfig(), (1, 1)),
        (7, StepConfig(chunk=3), (2, 1)),
        (7, StepConfig(chunk=3), (1, 2)),
        (5, StepConfig("scan"), (1, 2)),
        (1, StepConfig(), (1, 2)),
    ],
)
def test_the_vit_gets_as_many_images_as_in_the_training_step(frames, step, shape):
    config, rows = small_model(), 4
    auto = (jax.sharding.AxisType.Auto,) * 2  # which is not the default in newer versions
    mesh = jax.sharding.AbstractMesh(shape, ("data", "model"), axis_types=auto)
    seen = []

    def watch(run, arguments, options, context):
        if isinstance(context.module, VisionTransformer) and context.method_name == "__call__":
            seen.append(len(arguments[0]))
        return run(*arguments, **options)

    shapes = param_shapes(config)
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    learned = {path: leaf for path, leaf in params.items() if not path.startswith("vision/")}
    frozen = {path: leaf for path, leaf in params.items() if path not in learned}
    own = rows // step.accumulate
    ids, mask = jnp.zeros((own, 6), jnp.int32), jnp.ones((own, 6), bool)
    batch = Batch(
        jnp.zeros((own, frames, 28, 28, 3), jnp.uint8),
        jnp.ones((own, frames), bool),
        jnp.zeros(own, jnp.uint32),
        Question(ids, mask, ids, mask),
        mask,
    )
    key = jax.random.key(0)
    with nn.intercept_methods(watch), jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(lambda *given: loss_fn(*given, config, key, step), learned, frozen, batch)
    first, head, rest = images_at_a_time(step, frames, rows, mesh)
    assert first == (frames if step.gradient == "scan" or frames == 1 else frames % step.chunk)
    pieces = ([head] if first else []) + ([rest] if first < frames else [])
    assert set(seen) == set(pieces)


def test_the_vit_is_that_of_a_run(small_run):
    config = get_config()
    model = from_dict(config.model.to_dict())
    abstract = abstract_params(model, config.optim.groups, make_mesh())
    whole = join_params(restore_params(small_run, abstract), {})
    alone = vision_params(small_run, model, abstract, (), 0)
    assert alone.keys() == {"vision"}
    assert fingerprint(alone) == fingerprint({"vision": whole["vision"]})
    assert fingerprint(alone) != fingerprint(vision_params("", model, abstract, (), 1))


# --- whoever computes it --------------------------------------------------------------------------


def test_a_killed_job_goes_on_with_the_shards_that_are_missing(prepared, data_dir, tmp_path):
    output = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "adacm2_jax.commands",
        "prepare",
        *arguments(data_dir),
        f"--output={output}",
    ]
    started = subprocess.Popen(command, cwd=ROOT, env=process_environment())
    deadline = time.monotonic() + 120
    while not list(output.glob("features-*")):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    started.send_signal(signal.SIGKILL)
    started.wait()
    left = {path.name: path.stat().st_mtime_ns for path in output.glob("features-*")}
    assert 0 < len(left) < 8 and "done" not in read_manifest(output)
    assert prepare(*command[4:]) == 0
    assert shards(output) == shards(prepared)
    assert (output / "manifest.json").read_text() == (prepared / "manifest.json").read_text()
    assert not list(output.glob(".*"))
    assert all((output / name).stat().st_mtime_ns == time for name, time in left.items())


def two_processes(command: list[str], *more: list[str]) -> tuple[list[int], list[str]]:
    """Status and output of two processes of one job, with four devices each."""
    meet = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    started = start(
        2,
        lambda number: [
            "-m",
            "adacm2_jax.commands",
            "prepare",
            *command,
            *more[number],
            *meet,
            f"--process_id={number}",
        ],
    )
    said = []
    for process in reversed(started):
        said.insert(0, process.communicate(timeout=240)[0])
        if process.returncode:  # the other would take a minute to notice
            started[0].kill()
    return [process.returncode for process in started], said


def test_processes_and_devices_share_the_work(prepared, data_dir, tmp_path):
    """As many images a device as one alone has."""
    output = tmp_path / "shared"
    command = [*arguments(data_dir), f"--output={output}", "--rows=8"]
    status, said = two_processes(command, [], [])
    assert status == [0, 0], "\n".join(said)
    assert shards(output) == shards(prepared)
    assert sum("192 frames of 48 clips" in text for text in said) == 1


def test_processes_that_are_told_different_things_are_refused(data_dir, tmp_path):
    output = tmp_path / "shared"
    command = [*arguments(data_dir), f"--output={output}"]
    status, said = two_processes(command, [], ["--dtype=int8"])
    assert status[1] == 2
    assert "dtype is 'bfloat16' there, 'int8' here" in said[1]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "more", "expected"),
    [
        ({}, ["--dtype=int4"], "--dtype=int4: it must be bfloat16, float32, int8"),
        (
            {"data__jitter": True},
            [],
            "data.jitter = True: features are of the same instants in every epoch",
        ),
        ({"init_from": "nowhere"}, [], "nowhere: no checkpoint here"),
        ({"optim__groups": "(('.*',1.0),)"}, [], "but vision/blocks/"),
        ({}, ["--shards=49"], "49 shards for 48 videos"),
        ({}, ["--split=nothing"], "no split 'nothing'"),
        ({}, ["--runner=direct"], "needs Apache Beam: pip install apache-beam"),
    ],
)
def test_what_cannot_be_prepared_is_one_line(
    data_dir, tmp_path, capsys, monkeypatch, changes, more, expected
):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    command = [*arguments(data_dir, **changes), f"--output={tmp_path / 'cache'}", *more]
    assert prepare(*command) == 2
    assert expected in error_line(capsys)
    assert not (tmp_path / "cache").exists()


def test_an_output_that_holds_something_else_is_refused(prepared, data_dir, tmp_path, capsys):
    assert prepare(*arguments(data_dir), f"--output={prepared}", "--dtype=int8") == 2
    assert "dtype is 'bfloat16' there, 'int8' here" in error_line(capsys)
    assert prepare(*arguments(data_dir, seed=1), f"--output={prepared}") == 2
    assert "vision.weights is" in error_line(capsys)
    (tmp_path / "letter.txt").write_text("dear reader")
    assert prepare(*arguments(data_dir), f"--output={tmp_path}") == 2
    assert "holds something else; name an empty directory" in error_line(capsys)


def test_what_a_killed_process_left_does_not_make_an_output_something_else(
    data_dir, tmp_path, capsys
):
    """Its manifest, on the way: nothing else was there."""
    output = tmp_path / "cache"
    output.mkdir()
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    left = output / f".manifest.json.partial-{socket.gethostname()}-{gone}"
    left.write_text("{")
    assert prepare(*arguments(data_dir), f"--output={output}", "--shards=49") == 2
    assert "49 shards for 48 videos" in error_line(capsys) and not left.exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"data__features": "nowhere"},
            "nowhere: no manifest.json there; run adacm2 prepare first",
        ),
        ({"data__cache": True}, "data.features = "),
        ({"optim__groups": "(('.*',1.0),)", "train__gradient": "scan"}, "of a frozen ViT, but"),
        ({"data__resize": "ma_lmm"}, "load.resize is 'clean' there, 'ma_lmm' here"),
        ({"model__dtype": "float32"}, "vision.dtype is 'bfloat16' there, 'float32' here"),
        ({"seed": 1}, "vision.weights is"),
        ({"data__features": "", "data__features_local": "here"}, "here is for features; set data"),
        ({"data__features_local": "/proc/here"}, "data.features_local = /proc/here: nothing can"),
    ],
)
def test_training_refuses_features_that_do_not_fit(
    prepared, data_dir, tmp_path, capsys, changes, expected
):
    command = arguments(data_dir, **({"data__features": prepared} | changes))
    command.append(f"--config.data.cache_dir={tmp_path / 'cache'}")
    assert run_script("train.py", *command, f"--workdir={tmp_path / 'run'}") == 2
    assert expected in error_line(capsys)
    assert not (tmp_path / "run/config.json").exists()  # a run that has not begun is none


def test_features_are_no_copy_of_themselves(prepared, data_dir, tmp_path, capsys):
    link = tmp_path / "link"
    link.symlink_to(prepared)
    command = arguments(data_dir, data__features=prepared, data__features_local=link)
    assert run_script("train.py", *command, f"--workdir={tmp_path / 'run'}") == 2
    assert f"{link} is data.features itself" in error_line(capsys)


def test_only_a_vit_that_learns_is_refused():
    refuse_learning(["ln_vision/scale", "qformer/norm/scale", "temporal_embed"])
    with pytest.raises(UserError, match="vision/cls_token learns: freeze vision/"):
        refuse_learning(["qformer/norm/scale", "vision/pos_embed", "vision/cls_token"])


def test_a_fingerprint_is_of_values_names_and_types():
    one = {"a": jnp.arange(4.0), "b": jnp.ones((2, 2), jnp.bfloat16)}
    assert fingerprint(one) == fingerprint({"b": one["b"], "a": np.arange(4, dtype=np.float32)})
    others = [
        one | {"a": one["a"].at[3].add(1e-6)},
        one | {"a": one["a"].reshape(2, 2)},
        one | {"b": one["b"].astype(jnp.float32)},
        {"a": one["a"], "c": one["b"]},
    ]
    assert len({fingerprint(params) for params in [one, *others]}) == 5
