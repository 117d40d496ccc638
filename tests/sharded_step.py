"""One training step on several meshes, in a process that has eight virtual devices.

Prints one JSON object: for each mesh what the loss is, how far the gradients are from those of one
device, and how the language model's weights are split.
"""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding

from adacm2_jax.inference import steps as streaming
from adacm2_jax.models.adacm2 import AdaCM2, Question, init_params, init_state, state_specs
from adacm2_jax.models.params import split_params
from adacm2_jax.sharding import make_mesh, param_shardings, replicated, shard_batch
from adacm2_jax.training.optim import make_optimizer
from adacm2_jax.training.step import (
    Batch,
    StepConfig,
    init_train_state,
    loss_fn,
    make_train_step,
)
from benchmarks import _hlo
from tests.small import small_model

ROWS, FRAMES = 8, 7
OPTIONS = StepConfig(chunk=2)
GROUPS = (("vision/.*", None), (".*", 1.0))


def make_batch(config) -> Batch:
    rng = np.random.default_rng(0)
    size, length = config.vision.image_size, config.max_text_len + config.max_answer_len
    place = np.arange(length)
    valid = np.arange(FRAMES) < rng.integers(1, FRAMES + 1, ROWS)[:, None]
    # Answers of one to three tokens: the mean over a batch is not that of its devices' means.
    end = rng.integers(10, 13, ROWS)[:, None]
    assert len(set(end.ravel())) > 1
    question = Question(
        rng.integers(5, 150, (ROWS, config.max_text_len), dtype=np.int32),
        np.arange(config.max_text_len) < rng.integers(2, 20, ROWS)[:, None],
        rng.integers(5, 300, (ROWS, length), dtype=np.int32),
        place < end,
    )
    targets = (place >= 9) & (place < end)
    return Batch(
        rng.integers(0, 255, (ROWS, FRAMES, size, size, 3), dtype=np.uint8),
        valid,
        np.arange(ROWS, dtype=np.uint32),
        question,
        targets,
    )


@functools.cache
def fresh_values(config):
    """Parameters with their axes, as shapes, and values that are made on one device: random
    numbers need not be equal on every mesh."""
    made = jax.jit(init_params, static_argnums=0)
    boxed = jax.eval_shape(functools.partial(made, config), jax.random.key(0))
    return boxed, jax.device_get(nn.unbox(made(config, jax.random.key(0))))


def params_on(mesh, config):
    boxed, values = fresh_values(config)
    return jax.device_put(values, param_shardings(boxed, mesh))


def frame_collectives(compiled) -> dict:
    """What devices exchange within the loops over frames, and which loops there are."""
    collectives, loops = _hlo.read(compiled.as_text())
    return {
        "loops": sorted(_hlo.frame_loops(loops)),
        "all": len(collectives),
        "found": [[each.kind, each.shapes] for each in collectives if each.in_frame_loop],
    }


def stream_on(mesh, config) -> dict:
    """The streaming step of evaluation: the memory after two chunks, and its collectives."""
    model, batch = AdaCM2(config), make_batch(config)
    params = params_on(mesh, config)
    state = init_state(config, jax.numpy.asarray(batch.valid.sum(1)))
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(state))
    state = jax.device_put(state, places)
    question, valid = shard_batch((batch.question, batch.valid[:, :3]), mesh)
    program = None
    with jax.set_mesh(mesh):
        for start in (0, 3):
            frames = shard_batch(batch.frames[:, start : start + 3], mesh)
            features = streaming.encode(model, params, frames)
            arguments = params, features, valid, question, state
            program = program or streaming.read.lower(model, *arguments).compile()
            state = program(*arguments)  # refuses a state that lies elsewhere than the first one
    return {"queries": np.asarray(state.queries), "collectives": frame_collectives(program)}


def step_on(mesh, config) -> tuple[dict, dict, dict, dict]:
    """Metrics, first moments (a tenth of the gradients), all parameters, and collectives."""
    params = params_on(mesh, config)
    learned, frozen = split_params(params, GROUPS)
    rule, _ = make_optimizer(
        learned,
        groups=GROUPS,
        learning_rate=1e-3,
        steps=9,
        warmup_steps=0,
        weight_decay=0.0,
        b1=0.9,
        b2=0.999,
        clip_norm=1e9,
    )
    state = init_train_state(learned, frozen, rule, mesh)
    batch = shard_batch(make_batch(config), mesh)
    assert len(batch.frames.addressable_shards) == mesh.size
    with jax.set_mesh(mesh):
        train_step = make_train_step(config, rule, 0, state, OPTIONS).lower(state, batch).compile()
    state, metrics = train_step(state, batch)
    moments = jax.tree.map(np.asarray, state.opt_state[1][0].mu)
    state, _ = train_step(state, batch)  # refuses a state that lies elsewhere than the first one
    collectives = frame_collectives(train_step)
    return jax.device_get(metrics), moments, state.learned | state.frozen, collectives


def loss_of_three_videos(mesh, config) -> float:
    """Three rows divide over one device, and over no more."""
    params = params_on(mesh, config)
    learned, frozen = split_params(params, GROUPS)
    batch = jax.device_put(
        jax.tree.map(lambda leaf: leaf[:3], make_batch(config)), replicated(mesh)
    )
    with jax.set_mesh(mesh):
        loss = jax.jit(loss_fn, static_argnums=(3, 5))
        return float(loss(learned, frozen, batch, config, jax.random.key(0), OPTIONS)[0])


def main() -> None:
    small = small_model()
    config = dataclasses.replace(
        small,
        qformer=dataclasses.replace(small.qformer, dropout=0.0),
        llm=dataclasses.replace(small.llm, num_heads=4, num_kv_heads=4),
    )
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    metrics, moments, *_ = step_on(one, config)
    streamed = stream_on(one, config)
    odd = [loss_of_three_videos(mesh, config) for mesh in (one, make_mesh((8, 1)))]
    report = {"loss": float(metrics["loss"]), "odd": odd}
    for shape in ((8, 1), (4, 2), (2, 4)):
        other, found, params, collectives = step_on(make_mesh(shape), config)
        parted = stream_on(make_mesh(shape), config)
        # Key biases cancel in the softmax: their gradients are zero but for rounding.
        least = max(np.abs(leaf).max() for leaf in moments.values()) / 50
        apart = {
            name: float(np.abs(found[name] - leaf).max() / max(np.abs(leaf).max(), least))
            for name, leaf in moments.items()
        }
        report["x".join(map(str, shape))] = {
            "loss": float(other["loss"]),
            "collectives": {"train": collectives, "stream": parted["collectives"]},
            "streamed": float(np.abs(parted["queries"] - streamed["queries"]).max()),
            "apart": max(apart.values()),
            "worst": max(apart, key=lambda name: apart[name]),
            "share": {
                name: int(leaf.size // leaf.addressable_shards[0].data.size)
                for name, leaf in params.items()
                if leaf.ndim >= 3 or name.startswith("vision")
            },
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
