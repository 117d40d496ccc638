"""What the planner says of small models, against their compiled programs."""

import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.plan.report import compile_step, render
from adacm2_jax.plan.steps import device_bytes, make_plan, program
from adacm2_jax.plan.topology import parse_topology, topology_devices
from adacm2_jax.runs import experiment
from adacm2_jax.sharding import make_mesh
from benchmarks._compiled import beside
from benchmarks._hlo import frame_loops, read
from tests import small
from tests.plan.small import small_config, small_plan

V5E = parse_topology("v5e:2x2")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh((-1, 1), topology_devices(V5E))


@pytest.fixture(scope="module")
def training(mesh):
    """The smallest training step, compiled for four TPUs."""
    config = small.get_config()
    config.train.num_frames, config.train.chunk = 8, 2
    return compile_step(make_plan(experiment.read(config), "train"), V5E, mesh)


@pytest.fixture(scope="module")
def reading(mesh):
    """A chunk of frames, compiled for four TPUs."""
    return compile_step(small_plan("stream"), V5E, mesh)


def test_the_memory_of_a_training_step_is_that_of_its_arrays(training, mesh):
    memory = training.memory
    arrays = device_bytes(program(training.plan, mesh)[1])
    # Tiles of 8 × 128 numbers pad the last axes, which are 16 long here.
    assert arrays < memory.arguments < 8 * arrays
    assert memory.aliased > 0.9 * memory.output, "the state is donated"
    new = memory.output - memory.aliased
    assert memory.total == memory.arguments + memory.temporaries + new + memory.code
    assert training.fits and memory.total < V5E.chip.hbm and memory.exact


def test_nothing_is_sent_inside_the_loop_over_frames(training, reading):
    sent, loops = read(training.compiled.as_text())
    assert frame_loops(loops) >= {"chunks of frames", "frames"}
    assert sent, "weights of the language model are gathered, gradients are summed"
    assert not any(each.in_frame_loop for each in sent)
    sent, loops = read(reading.compiled.as_text())
    assert frame_loops(loops) >= {"frames"}  # the ViT's layers follow one another without a loop
    assert sent == []


def test_the_compiler_computes_no_row_twice(reading, mesh):
    found = beside(reading, mesh)
    assert found["sent_in_frame_loop"] == []
    assert 1 <= found["flops_by_compiler"] < 1.1  # elementwise arithmetic


def test_a_report_is_told_in_words(training):
    text = render(training.to_json())
    for word in ("train  v5e:2x2", "parameters", "temporaries", "aliased", "fits", "TFLOP"):
        assert word in text
    larger = render(training.to_json() | {"largest_batch": 12, "too_large_batch": 16})
    assert "largest batch that fits: 12; 16 does not" in larger


def test_a_report_for_machines_has_the_figures_of_one_device(training):
    result = training.to_json()
    assert result["flops"] == training.flops > result["flops_rematerialised"] == 0
    assert result["least_seconds"] == training.flops / 197e12
    assert result["memory"]["total"] == training.memory.total


def test_what_does_not_fit_is_reported_with_what_it_would_need(mesh):
    report = compile_step(small_plan("stream", eval__batch_size=2**26), V5E, mesh)
    assert not report.fits and not report.memory.exact and report.compiled is None
    assert report.memory.total > V5E.chip.hbm
    assert "does not fit" in render(report.to_json())


def test_a_batch_that_does_not_divide_is_refused(mesh):
    with pytest.raises(UserError, match="batch_size = 6"):
        compile_step(small_plan("train", train__batch_size=6), V5E, mesh)


def test_the_model_of_a_plan_is_that_of_its_configuration():
    config = small_config("merge")
    assert small_plan("train", "merge").model == experiment.read(config).model


def test_a_step_that_there_is_not_is_refused():
    with pytest.raises(UserError, match="--step evaluate"):
        small_plan("evaluate")
