"""What the planner says of small models, against their compiled programs."""

import dataclasses
import types

import jax
import pytest

from adacm2_jax.config import MemoryConfig, tiny, to_dict
from adacm2_jax.errors import UserError
from adacm2_jax.plan import hlo, search
from adacm2_jax.plan.estimate import abstract_mesh, estimate, estimate_memory
from adacm2_jax.plan.loops import frame_loops, loop_name
from adacm2_jax.plan.need import need
from adacm2_jax.plan.report import compile_step, render
from adacm2_jax.plan.search import largest_batch
from adacm2_jax.plan.steps import STEPS, lower, make_plan
from adacm2_jax.plan.topology import parse_topology, topology_devices
from adacm2_jax.sharding import make_mesh
from configs import lvu
from configs.base import base_config
from tests.small import quick_compilation

V5E = parse_topology("v5e:2x2")
POLICIES = {
    "eq8": MemoryConfig(),
    "eq6": MemoryConfig(recent_ratio="0.9"),
    "full": MemoryConfig(policy="full", max_frames=8),
    "merge": MemoryConfig(policy="merge", bank_frames=3),
}


def small(policy: str = "eq8", **fields):
    """A small model with a frozen ViT and LLM, on clips of eight frames in chunks of four."""
    config = base_config(tiny(memory=POLICIES[policy]))
    config.train.num_frames, config.train.chunk, config.eval.chunk = 8, 4, 4
    config.train.batch_size = config.eval.batch_size = 4
    for path, value in fields.items():
        section, field = path.split("__")
        config[section][field] = value
    return config


@pytest.fixture(scope="module")
def here():
    """A mesh of the one device of this process."""
    return make_mesh((1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def compiled():
    """The small training step on four TPUs."""
    mesh = make_mesh((-1, 1), topology_devices(V5E))
    return compile_step(make_plan(small(), "train"), V5E, mesh)


@pytest.mark.parametrize("policy", ["eq8", "full", "merge"])
def test_a_streaming_step_computes_what_is_needed(policy, here):
    plan = make_plan(small(policy), "stream")
    with quick_compilation():
        computed = hlo.read(lower(plan, here).compile()).flops()
    assert computed == pytest.approx(need(plan).total, rel=0.02)


def test_decoding_computes_what_is_needed(here):
    plan = make_plan(small(), "decode")
    with quick_compilation():
        program = hlo.read(lower(plan, here).compile())
    computed = program.flops(plan.generation.max_new_tokens - 1)
    assert computed == pytest.approx(need(plan).total, rel=0.02)


def test_a_training_step_computes_little_more_than_is_needed(compiled):
    result = compiled.to_json()
    assert 0.9 < result["flops_ratio"] < 1.25  # at this size the optimiser's norms count
    assert result["fits"] and result["memory"]["total"] < result["hbm"]


def test_nothing_is_communicated_inside_the_loop_over_frames(compiled):
    names = {loop_name(loop, compiled.program) for loop in frame_loops(compiled.program)}
    assert {"chunks of frames", "frames", "ViT blocks"} <= names
    assert compiled.collectives
    assert not any(row["inside_frame_loop"] for row in compiled.collectives)
    assert any("LLM layers" in row["loop"] for row in compiled.collectives)


def test_a_report_is_told_in_words(compiled):
    text = render(compiled.to_json())
    for word in ("arguments", "temporaries", "fits", "needed", "collectives", "LLM layers"):
        assert word in text


def test_what_does_not_fit_is_reported_with_what_it_would_need():
    mesh = make_mesh((-1, 1), topology_devices(V5E))
    plan = make_plan(small(eval__batch_size=2**26), "stream")
    report = compile_step(plan, V5E, mesh)
    assert not report.fits and not report.memory.exact
    assert report.memory.total > V5E.chip.hbm
    assert "does not fit" in render(report.to_json())


@pytest.mark.parametrize("step", STEPS)
def test_estimated_arguments_are_those_of_the_program(step, here):
    plan, one = make_plan(small(), step), parse_topology("h100")
    guess = estimate_memory(plan, one, abstract_mesh((1, 1), one))
    with quick_compilation():
        found = lower(plan, here).compile().memory_analysis()
    assert guess.arguments == pytest.approx(found.argument_size_in_bytes, rel=1e-3)


def full_size(step: str, **fields):
    config = lvu.get_config()
    for path, value in fields.items():
        section, field = path.split("__")
        config[section][field] = value
    return make_plan(config, step)


def test_estimated_temporaries_of_training_do_not_grow_with_the_clip():
    v5e = parse_topology("v5e:4x4")
    mesh = abstract_mesh((-1, 1), v5e)
    short, long = (
        estimate_memory(full_size("train", train__num_frames=frames), v5e, mesh)
        for frames in (20, 1000)
    )
    assert short.temporaries == long.temporaries
    assert long.arguments > short.arguments


def test_the_full_size_fits_sixteen_chips_and_not_one():
    for name, fits in (("v5e:4x4", True), ("v5e:1x1", False)):
        topology = parse_topology(name)
        plan = full_size("train", train__batch_size=16)
        assert estimate(plan, topology, abstract_mesh((-1, 1), topology))["fits"] is fits


def test_more_memory_holds_a_larger_batch():
    plan = full_size("train")
    small_chip, large_chip = (
        largest_batch(plan, parse_topology(name), (-1, 1), compiled=False)["largest_batch"]
        for name in ("v5e:4x4", "v6e:4x4")
    )
    assert 0 < small_chip < large_chip
    assert small_chip % 16 == 0
    topology = parse_topology("v5e:4x4")
    mesh = abstract_mesh((-1, 1), topology)
    assert estimate(dataclasses.replace(plan, batch=small_chip), topology, mesh)["fits"]
    assert not estimate(dataclasses.replace(plan, batch=small_chip + 16), topology, mesh)["fits"]


class Compiler:
    """Stands for ``compile_step``: what has more rows than ``most`` does not fit."""

    def __init__(self, most: int):
        self.most, self.asked = most, []

    def __call__(self, plan, topology, mesh):
        self.asked.append(plan.batch)
        return types.SimpleNamespace(fits=plan.batch <= self.most)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.97, 1.0, 1.03, 1.1, 1.9])
def test_the_compiler_may_raise_and_lower_the_largest_batch(share, monkeypatch):
    plan, v5e = full_size("train"), parse_topology("v5e:4x4")
    guess = largest_batch(plan, v5e, (-1, 1), compiled=False)
    assert guess["too_large_batch"] == guess["largest_batch"] + 16
    compiler = Compiler(int(share * guess["largest_batch"]))
    monkeypatch.setattr(search, "compile_step", compiler)
    found = largest_batch(plan, v5e, (-1, 1))
    fits, too_large = found["largest_batch"], found["too_large_batch"]
    assert fits <= compiler.most < too_large and too_large in compiler.asked
    assert fits == 0 or fits in compiler.asked
    assert too_large - fits <= max(16, search.GRAIN * guess["largest_batch"])
    # Steps that double until they are past, and as many halves.
    assert len(compiler.asked) <= 2 + 2 * 5
    assert guess["largest_batch"] == compiler.asked[0]
    by = {True: "compiler", False: "estimate"}
    for result in (guess, found):
        told = f"{result['too_large_batch']} does not (by the "
        text = render(estimate(plan, v5e, abstract_mesh((-1, 1), v5e)) | result)
        assert told + by[result["largest_batch_confirmed"]] in text


@pytest.mark.parametrize("most", range(1, 40))
@pytest.mark.parametrize("start", [1, 7, 32])
def test_a_bracket_of_one_is_exact(most, start):
    assert search.bracket(lambda times: times <= most, start, 1) == (most, most + 1)


def test_a_small_model_has_a_largest_batch_beyond_any_bound():
    h100 = parse_topology("h100")
    found = largest_batch(make_plan(small(), "stream"), h100, (1, 1), compiled=False)
    assert found["largest_batch"] > 4096 and found["too_large_batch"] - 1 == found["largest_batch"]


def test_a_vit_that_learns_is_paid_for_by_the_frame():
    """What its blocks keep: float32 rows of every image, padded to tiles of 8 × 128."""
    v5e = parse_topology("v5e:2x2")
    mesh = abstract_mesh((-1, 1), v5e)
    learning = (("llm/.*", None), (".*", 1.0))

    def phases(frames, groups=learning, **fields):
        plan = full_size(
            "train",
            train__batch_size=4,
            train__gradient="scan",
            train__num_frames=frames,
            optim__groups=groups,
            **fields,
        )
        return estimate_memory(plan, v5e, mesh).phases

    frozen = phases(10, (("(vision|llm)/.*", None), (".*", 1.0)))
    assert "ViT, backward" not in frozen
    few, many = phases(10)["ViT, backward"], phases(30)["ViT, backward"]
    assert few["ViT, kept"] == 39 * 10 * 264 * 1408 * 4
    assert many["ViT, kept"] == 3 * few["ViT, kept"]
    assert few["ViT, cast"] == many["ViT, cast"] > 39 * (4 * 1408**2 + 2 * 1408 * 6144) * 2
    assert few["gradients"] == many["gradients"] > 2 * few["ViT, cast"]
    assert phases(10, model__remat=False)["ViT, backward"]["ViT, kept"] > 5 * few["ViT, kept"]


def test_a_batch_that_does_not_divide_is_refused(here):
    mesh = abstract_mesh((-1, 1), V5E)
    with pytest.raises(UserError, match="batch_size = 6"):
        estimate(make_plan(small(train__batch_size=6), "train"), V5E, mesh)


def test_the_model_of_a_plan_is_that_of_its_configuration():
    plan = make_plan(small("eq6"), "train")
    assert to_dict(plan.model) == small("eq6").model.to_dict()


def test_a_step_that_there_is_not_is_refused():
    with pytest.raises(UserError, match="--step evaluate"):
        make_plan(small(), "evaluate")
