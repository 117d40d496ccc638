"""The two-phase gradient against differentiating through all frames, in float64."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adacm2_jax.config import MemoryConfig
from adacm2_jax.errors import UserError
from adacm2_jax.models.adacm2 import AdaCM2, Question, init_params, init_state
from adacm2_jax.models.params import join_params, split_params
from adacm2_jax.sharding import make_mesh, replicated
from adacm2_jax.training.step import (
    Batch,
    StepConfig,
    check_step,
    init_train_state,
    loss_and_gradients,
    loss_fn,
    make_train_step,
)
from adacm2_jax.training.two_phase import read_all_but_last
from tests.small import quick_compilation, small_model

GROUPS = (("(vision|llm)/.*", None), (".*", 1.0))
SMALL = small_model()
EXACT = dataclasses.replace(
    SMALL,
    dtype="float64",
    qformer=dataclasses.replace(SMALL.qformer, depth=4, dropout=0.0),
    temporal_positions=12,
)
RATIOS = dict(recent_ratio="0.3,0.2", conserve_ratio="0.5,0.7")
MEMORIES = {
    "adacm2": MemoryConfig(**RATIOS),
    "text rows": MemoryConfig(recent_ratio="0.3", conserve_ratio="0.6", score_rows="query+text"),
    "budget": MemoryConfig(policy="budget", capacity=13, recent_ratio="0.4"),
    "full": MemoryConfig(policy="full", max_frames=50),
    "recent frames": MemoryConfig(policy="recent_frames", recent_frames=3),
    "running score": MemoryConfig(**RATIOS, decay=0.5),
    "one choice for all layers": MemoryConfig(
        recent_ratio="0.3", conserve_ratio="0.6", shared_choice=True
    ),
    "recent by layer": MemoryConfig(policy="recent", **RATIOS),
    "uniform": MemoryConfig(policy="uniform", recent_ratio="0.3", conserve_ratio="0.6"),
    "random": MemoryConfig(policy="random", recent_ratio="0.3", conserve_ratio="0.6"),
}


def make_batch(frames: int, pixels: bool = False, lengths: Sequence[int] = ()) -> Batch:
    """Videos of several lengths, one with a gap, one without a frame; features, or pixels."""
    rng = np.random.default_rng(frames)
    c, length = EXACT, EXACT.max_text_len + EXACT.max_answer_len
    lengths = np.array(lengths or (frames, -(-frames // 2), max(frames - 1, 1), 0))
    rows = len(lengths)
    valid = np.arange(frames) < lengths[:, None]
    if frames > 4:
        valid[0, 2] = False
    shape = (c.vision.tokens_per_frame, c.vision.width)
    clip = rng.standard_normal((rows, frames, *shape))
    if pixels:
        size = c.vision.image_size
        clip = rng.integers(0, 256, (rows, frames, size, size, 3), dtype=np.uint8)
    words, place = rng.integers(3, 20, rows), np.arange(length)
    question = Question(
        rng.integers(5, 150, (rows, c.max_text_len), dtype=np.int32),
        np.arange(c.max_text_len) < words[:, None],
        rng.integers(5, 300, (rows, length), dtype=np.int32),
        np.broadcast_to(place < 12, (rows, length)),
    )
    targets = (place >= 9) & (place < rng.integers(10, 13, rows)[:, None]) & (lengths > 0)[:, None]
    return Batch(clip, valid, np.arange(rows, dtype=np.uint32), question, targets)


def random_params(dtype) -> dict:
    """Of a size that makes attention sharp, so that tokens differ in score."""
    rng = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(lambda key: init_params(EXACT, key), jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), dtype), shapes)


def gradients_of(config, batch: Batch, options: StepConfig):
    learned, frozen = split_params(random_params(config.dtype), GROUPS)
    run = jax.jit(loss_and_gradients, static_argnums=(3, 5))
    with quick_compilation():
        return jax.device_get(run(learned, frozen, batch, config, jax.random.key(0), options))


def apart(found: dict, expected: dict) -> float:
    """The largest difference, relative to the largest gradient of its parameter.

    Gradients that are zero but for rounding (of key biases, which cancel in the softmax; of what a
    single frame does not use) are measured by the size that gradients have in general.
    """
    typical = np.median([np.abs(leaf).max() for leaf in expected.values()])
    return max(
        float(np.abs(found[name] - leaf).max() / max(np.abs(leaf).max(), 1e-3 * typical))
        for name, leaf in expected.items()
    )


def assert_same_gradients(config, batch: Batch, chunk: int) -> dict:
    with jax.enable_x64(True):
        loss, accuracy, expected = gradients_of(config, batch, StepConfig("scan"))
        found = gradients_of(config, batch, StepConfig("two_phase", chunk))
    assert {leaf.dtype.name for leaf in (loss, *expected.values())} == {"float64"}
    assert abs(found[0] - loss) <= 1e-12 * loss
    assert found[1] == accuracy
    assert apart(found[2], expected) <= 1e-12
    return expected


@pytest.mark.parametrize("memory", MEMORIES)
def test_two_phases_have_the_gradient_of_the_whole_scan(memory):
    batch = make_batch(50, lengths=(50, 34, 21, 8, 3, 2, 1, 0))
    config = dataclasses.replace(EXACT, memory=MEMORIES[memory])
    expected = assert_same_gradients(config, batch, 25)
    # Frames before the last one have a share in it: these alone stand in five rows of the table.
    assert sum(np.abs(row).max() > 0 for row in expected["temporal_embed"]) > 5


@pytest.mark.parametrize(("frames", "chunk"), [(2, 4), (7, 3)])
def test_a_clip_of_any_size_in_chunks_of_any_size(frames, chunk):
    config = dataclasses.replace(EXACT, memory=MEMORIES["adacm2"])
    assert_same_gradients(config, make_batch(frames), chunk)


def test_the_gradient_of_the_last_frame_alone_would_be_another_one():
    with jax.enable_x64(True):
        config = dataclasses.replace(EXACT, memory=MEMORIES["adacm2"])
        batch = make_batch(7)
        expected = gradients_of(config, batch, StepConfig("two_phase", 3))[2]
        places = np.arange(7) == np.array([6, 3, 5, -1])[:, None]
        detached = gradients_of(config, batch.replace(valid=places), StepConfig("scan"))[2]
    assert apart(detached, expected) > 0.01


def test_a_detached_memory_has_the_same_loss_and_teaches_nothing_of_earlier_frames():
    """Only what makes keys and values of visual tokens learns otherwise than with two phases."""
    config, batch = dataclasses.replace(EXACT, memory=MEMORIES["adacm2"]), make_batch(7)
    with jax.enable_x64(True):
        exact_loss, _, exact = gradients_of(config, batch, StepConfig("two_phase", 3))
        loss, _, detached = gradients_of(config, batch, StepConfig("detached", 3))
    assert abs(loss - exact_loss) <= 1e-12 * exact_loss
    of_tokens = ("temporal_embed", "ln_vision", "qformer/frame_projection")
    other = {name for name in exact if name.startswith(of_tokens)}
    same = exact.keys() - other
    assert len(other) > 4 and len(same) > 20
    assert apart({n: detached[n] for n in same}, {n: exact[n] for n in same}) <= 1e-12
    # Videos of 6 (7, less a gap), 4, 6 and 0 frames: their last ones stand in these rows.
    rows = np.flatnonzero(np.abs(detached["temporal_embed"]).max(1))
    assert rows.tolist() == [3, 5]
    assert (np.abs(exact["temporal_embed"]).max(1) > 0).sum() > 3


def test_merge_takes_the_gradient_of_the_last_frame_in_both_forms():
    memory = MemoryConfig(policy="merge", bank_frames=3)
    assert_same_gradients(dataclasses.replace(EXACT, memory=memory), make_batch(7), 3)


def test_pixels_go_through_the_vit_in_chunks():
    config = dataclasses.replace(EXACT, memory=MEMORIES["adacm2"])
    assert_same_gradients(config, make_batch(6, pixels=True), 2)


def test_a_batch_in_parts_has_the_gradient_of_the_whole():
    parts = 4
    with jax.enable_x64(True):
        config = dataclasses.replace(EXACT, memory=MEMORIES["adacm2"])
        batch = make_batch(5, lengths=(5, 4, 5, 3, 0, 2, 1, 5))
        shares = batch.targets.reshape(-1, parts, batch.targets.shape[1]).sum((0, 2))
        assert len(set(shares.tolist())) > 1, "the parts do not weigh alike"
        loss, accuracy, expected = gradients_of(config, batch, StepConfig(chunk=5))
        found = gradients_of(config, batch, StepConfig(chunk=5, accumulate=parts))
    assert abs(found[0] - loss) <= 1e-12 * loss
    assert found[1] == pytest.approx(accuracy, rel=1e-12)
    assert apart(found[2], expected) <= 1e-12


def test_dropout_acts_in_phase_two_alone():
    """Which tokens stay does not depend on it, so a step over all frames cannot tell."""
    model = dataclasses.replace(EXACT, dtype="float32", memory=MEMORIES["adacm2"])
    batch = make_batch(5)
    batch = batch.replace(frames=batch.frames.astype(np.float32))
    drops = dataclasses.replace(model, qformer=dataclasses.replace(model.qformer, dropout=0.5))
    learned, frozen = split_params(random_params("float32"), GROUPS)
    run = jax.jit(loss_fn, static_argnums=(3, 5))
    options = StepConfig("two_phase", 5)
    with quick_compilation():
        losses = [
            float(run(learned, frozen, batch, config, jax.random.key(key), options)[0])
            for config, key in ((model, 0), (model, 1), (drops, 0), (drops, 1))
        ]
        found = [
            jax.jit(read_all_but_last, static_argnums=(0, 6))(
                AdaCM2(config),
                join_params(learned, frozen),
                batch.frames,
                batch.valid,
                batch.question,
                init_state(config, batch.valid.sum(1), batch.seed),
                5,
            )
            for config in (model, drops)
        ]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_vit_that_learns_needs_the_whole_scan():
    paths = ["qformer/word_embed", "vision/cls_token"]
    check_step(StepConfig(), ["qformer/word_embed"], 100)
    check_step(StepConfig(), paths, 1)
    check_step(StepConfig("scan"), paths, 100)
    with pytest.raises(UserError, match=r"two_phase.*vision/cls_token learns.*100 frames.*scan"):
        check_step(StepConfig(), paths, 100)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"gradient": "exact"},
            r"train\.gradient is 'exact'; it must be one of two_phase, scan, detached",
        ),
        ({"chunk": 0}, r"train\.chunk = 0 must be at least 1"),
        ({"accumulate": 0}, r"train\.accumulate = 0 must be at least 1"),
    ],
)
def test_what_a_step_cannot_be_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        StepConfig(**fields)


def test_a_step_with_epilogues_is_the_same_where_there_is_no_nvidia_gpu():
    """And the compiler takes the options, which are not for it."""
    mesh = make_mesh((1, 1), jax.devices()[:1])
    found = []
    for fused in (False, True):
        config = dataclasses.replace(EXACT, dtype="bfloat16", fused_epilogues=fused)
        given = jax.device_put(split_params(random_params("float32"), GROUPS), replicated(mesh))
        state = init_train_state(*given, optax.sgd(0.1), mesh)
        step = make_train_step(config, optax.sgd(0.1), 0, state, StepConfig("two_phase", 2))
        with quick_compilation(), jax.set_mesh(mesh):
            found.append(jax.device_get(step(state, make_batch(3, pixels=True))))
    plain, fused = found
    assert plain[1]["grad_norm"] > 0
    jax.tree.map(np.testing.assert_array_equal, fused, plain)
