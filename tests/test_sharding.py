"""Where arrays live, and that it changes nothing."""

import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from adacm2_jax import sharding
from adacm2_jax.errors import UserError
from adacm2_jax.models.adacm2 import init_params
from adacm2_jax.sharding import RULES, make_mesh, param_shardings, rows_per_process
from tests.small import ROOT, process_environment, small_model


def shapes():
    return jax.eval_shape(lambda key: init_params(small_model(), key), jax.random.key(0))


def abstract_mesh(data: int, model: int):
    return jax.sharding.AbstractMesh(
        (data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2
    )


def test_every_axis_of_every_parameter_has_a_rule():
    placed = param_shardings(shapes(), make_mesh())
    assert jax.tree.structure(placed) == jax.tree.structure(nn.unbox(shapes()))
    axes = {
        axis
        for leaf in jax.tree.leaves(shapes(), is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
        for axis in leaf.names
    }
    assert axes <= set(RULES)
    assert set(RULES.values()) == {None, "data", "model"}


def test_what_runs_once_a_frame_is_replicated_and_the_language_model_is_split():
    placed = param_shardings(shapes(), make_mesh())
    flat = jax.tree_util.tree_leaves_with_path(placed)
    for path, leaf in flat:
        part = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[0]
        if part in ("vision", "qformer", "ln_vision", "temporal_embed"):
            assert leaf.spec == PartitionSpec(*[None] * len(leaf.spec)), path
    split = {axis for path, leaf in flat for axis in leaf.spec if "llm" in str(path[0])}
    assert {"data", "model"} <= split


def test_two_axes_on_one_mesh_axis_are_refused(monkeypatch):
    monkeypatch.setitem(sharding.RULES, "llm_mlp", "data")
    with pytest.raises(
        UserError, match=r"llm/.*: two of its axes .*'llm_mlp'.* map to one mesh axis"
    ):
        param_shardings(shapes(), make_mesh())


def test_an_axis_that_does_not_divide_is_named():
    leaf = nn.Partitioned(jnp.zeros((3, 4)), ("llm_mlp", "llm_embed"))
    with pytest.raises(
        UserError, match=r"llm/w: an axis of 3 does not divide over mesh axis 'model'"
    ):
        param_shardings({"llm": {"w": leaf}}, abstract_mesh(1, 2))


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (0, 1), (-1, 3), (-1, 0), (-1, -1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(shape):
    with pytest.raises(UserError, match=r"mesh = .* the 1 device\(s\) present"):
        make_mesh(shape)


def test_a_mesh_takes_what_is_left():
    assert dict(make_mesh((-1, 1)).shape) == {"data": 1, "model": 1}
    assert dict(make_mesh((1, 1)).shape) == {"data": 1, "model": 1}


def test_a_batch_must_divide():
    assert rows_per_process(6, abstract_mesh(3, 2)) == 6
    with pytest.raises(
        UserError, match=r"train\.batch_size = 6 does not divide over 4 data shards"
    ):
        rows_per_process(6, abstract_mesh(4, 2))


@pytest.fixture(scope="module")
def report(compiled_once):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharded_step"],
        cwd=ROOT,
        env=process_environment() | {"XLA_FLAGS": flags, "NPROC": "32", "JAX_PLATFORMS": "cpu"},
        text=True,
        capture_output=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "2x4"])
def test_a_step_on_many_devices_is_that_of_one(report, mesh):
    # float32 sums of a few thousand terms in another order: sqrt(4096) x 6e-8, ten times for depth.
    assert report[mesh]["loss"] == pytest.approx(report["loss"], rel=1e-6)
    assert report[mesh]["apart"] < 4e-5, report[mesh]["worst"]


def test_videos_that_do_not_divide_over_the_devices_are_read_too(report):
    one, eight = report["odd"]
    assert eight == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize(("mesh", "parts"), [("8x1", 8), ("4x2", 8), ("2x4", 8)])
def test_after_the_step_each_device_still_holds_its_share(report, mesh, parts):
    shares = report[mesh]["share"]
    assert {share for name, share in shares.items() if name.startswith("vision")} == {1}
    kernels = [share for name, share in shares.items() if name.startswith("llm/layers")]
    assert kernels and set(kernels) == {parts}


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "2x4"])
@pytest.mark.parametrize("step", ["train", "stream"])
def test_devices_exchange_no_weights_scores_or_memory_within_the_frame_loop(report, mesh, step):
    found = report[mesh]["collectives"][step]
    assert "frames" in found["loops"]
    if step == "train":
        assert "chunks of frames" in found["loops"]
        assert found["all"], "weights of the language model are gathered, gradients are summed"
    if mesh == "8x1" or step == "stream":
        assert found["found"] == []
    # The images of a chunk are divided over the axis `model`: their features come together.
    features = [small_model().vision.tokens_per_frame, small_model().vision.width]
    for kind, shapes in found["found"]:
        assert kind == "all-gather"
        assert [shape[1:] for shape in shapes] == [features] * len(shapes)


@pytest.mark.parametrize("mesh", ["8x1", "4x2", "2x4"])
def test_a_stream_on_many_devices_is_that_of_one(report, mesh):
    # float32: after norms queries are about 1; sums of a few hundred terms in another order.
    assert report[mesh]["streamed"] < 1e-5
