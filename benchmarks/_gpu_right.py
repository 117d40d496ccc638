"""Section ``runs`` of gpu.py: is what the card computes right?"""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adacm2_jax.config import AdaCM2Config, tiny
from adacm2_jax.inference import steps
from adacm2_jax.inference.generate import GenerationConfig
from adacm2_jax.memory.fused import by_kernels
from adacm2_jax.memory.policies import plan_for
from adacm2_jax.memory.slots import (
    Frames,
    Queries,
    Retention,
    VideoMemory,
    init_memory,
    read_frames,
)
from adacm2_jax.models import int8_product
from adacm2_jax.models.adacm2 import AdaCM2, StreamState, init_params, init_state
from adacm2_jax.models.fused_norm import add_and_norm
from adacm2_jax.models.params import split_params, unstacked
from adacm2_jax.runs.experiment import OptimConfig
from adacm2_jax.sharding import make_mesh
from adacm2_jax.training.optim import make_optimizer
from adacm2_jax.training.step import StepConfig, init_train_state, make_train_step
from benchmarks._gpu import Rows, Size, ask, batch_of

ROOT = pathlib.Path(__file__).resolve().parent.parent


def section_runs(rows: Rows, size: Size) -> None:
    """The memory against its oracle; the tiny model on the card against the CPU."""
    begun, oracle = time.monotonic(), None
    if not size.tiny and not rows.late("oracle"):
        oracle = _start_oracle()  # beside the others: nothing is timed here
    if not rows.late("kernels"):
        _compare_kernels(rows, size)
        _compare_memory(rows, jnp.bfloat16, 2.0**-8)
        with jax.default_matmul_precision("highest"):
            _compare_memory(rows, jnp.float32, 2.0**-23)
    if not rows.late("ViT in bfloat16"):
        _compare_vit(rows)
    if not rows.late("tiny model"):
        with jax.default_matmul_precision("highest"):
            _compare(rows, "float32")
    if oracle:
        said, _ = oracle.communicate()
        told = (said.strip().splitlines() or ["nothing was said"])[-1]
        print(said[-3000:] if oracle.returncode else "", end="")
        seconds = time.monotonic() - begun
        rows.add("oracle", right=oracle.returncode == 0, told=told, seconds=seconds)


def _compare_kernels(rows: Rows, size: Size) -> None:
    """The kernels of the models against numpy in float64."""
    config, rng = size.config(), np.random.default_rng(0)
    width, wide = config.vision.width, config.llm.mlp_width
    x, added = (rng.normal(size=(257, width)).astype(np.float32) for _ in range(2))
    added = np.asarray(added.astype(jnp.bfloat16))
    scale, bias = (rng.normal(size=width).astype(np.float32) for _ in range(2))
    stream, normed = jax.jit(functools.partial(add_and_norm, epsilon=1e-6))(x, added, scale, bias)
    total = x.astype(np.float64) + added.astype(np.float64)
    exact = (total - total.mean(1, keepdims=True)) / np.sqrt(total.var(1, keepdims=True) + 1e-6)
    pairs = {"sum": (stream, total, 2.0**-23), "norm": (normed, exact * scale + bias, 2.0**-8)}
    for rows_of in (1, 4):
        row = rng.normal(size=(rows_of, config.llm.width)).astype(jnp.bfloat16)
        matrix = rng.integers(-127, 128, (config.llm.width, wide)).astype(np.int8)
        found = jax.jit(int8_product.product)(row, matrix)
        wanted = row.astype(np.float64) @ matrix.astype(np.float64)
        # Float32 sums of so many terms, from the largest of which each is at most a few times.
        pairs[f"int8, {rows_of} rows"] = found, wanted, 2.0**-23 * config.llm.width**0.5
    for name, (found, wanted, bound) in pairs.items():
        off = _off(np.asarray(found, np.float64), wanted)
        rows.add(f"kernel: {name}", right=off <= bound, off=off, bound=bound)


def _start_oracle() -> subprocess.Popen:
    """The memory's tests, on this device in the precision of their bounds."""
    platform = jax.default_backend()
    about = {
        "JAX_PLATFORMS": "cuda,cpu" if platform == "gpu" else platform,
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "tests/memory/test_slots.py"],
        cwd=ROOT,
        env=os.environ | about,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _on(device: Any, call: Callable[[], Any]) -> Any:
    """A computation on a device, as numpy arrays."""
    with jax.default_device(device):
        return jax.tree.map(np.asarray, call())


def _both(call: Callable[[], Any]) -> tuple[Any, Any]:
    """The same on the first device and on the CPU."""
    return _on(jax.devices()[0], call), _on(jax.devices("cpu")[0], call)


def _bound(config: AdaCM2Config, eps: float) -> float:
    """Relative rounding of a walk through all layers: the roundings of its longest chain of sums
    grow like the square root of their number; an activation is a few times the mean."""
    depth = config.vision.depth + config.qformer.depth + config.llm.depth
    return eps * (depth * config.vision.mlp_width) ** 0.5 * 8


def _off(mine: np.ndarray, other: np.ndarray) -> float:
    """The largest difference by the largest value."""
    return float(np.abs(mine - other).max() / np.abs(other).max())


def _compare(rows: Rows, dtype: str) -> None:
    """A stream, greedy and beam answers, and a training step of the tiny model."""
    config = tiny(dtype=dtype)
    params = _on(jax.devices("cpu")[0], lambda: nn.unbox(init_params(config, jax.random.key(0))))
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 56, 56, 3), np.uint8)
    bound = _bound(config, float(np.finfo(np.float32).eps))
    question = jax.tree.map(np.asarray, ask(config, 2, 8))
    valid = np.ones((2, 8), bool)
    model = AdaCM2(config)

    def stream() -> StreamState:
        state = init_state(config, jnp.zeros(2, jnp.int32))
        for _ in range(3):
            features = steps.encode(model, params, frames)
            state = steps.read(model, params, features, valid, question, state)
        return state

    mine, other = _both(stream)
    same = all(
        np.array_equal(mine.memory.in_time_order()[name], other.memory.in_time_order()[name])
        for name in ("frame", "patch", "live")
    )
    off = _off(mine.queries, other.queries)
    rows.add("stream", right=same and off <= bound, tokens_alike=same, off=off, bound=bound)
    for beams in (1, 3):
        options = GenerationConfig(max_new_tokens=8, num_beams=beams, eos_ids=(2,))
        arguments = other.queries, question, options, jax.random.key(0), np.arange(2)

        def answer(arguments=arguments):
            return steps.answer(steps.any_policy(config), params, *arguments)

        mine_said, other_said = _both(answer)
        same = np.array_equal(mine_said.ids, other_said.ids)
        off = _off(mine_said.scores, other_said.scores)
        rows.add(f"answer, {beams} beams", right=same and off <= bound, off=off, bound=bound)

    def step() -> tuple:
        return _train(config, params, frames, question, StepConfig(chunk=4))

    (mine_loss, mine_norm), (other_loss, other_norm) = _both(step)
    off = max(_off(mine_loss, other_loss), _off(mine_norm, other_norm))
    rows.add("training step", right=off <= bound, loss=float(mine_loss), off=off, bound=bound)


def _train(config, params, frames, question, options) -> tuple[jax.Array, jax.Array]:
    """The loss and the norm of the gradient of one step, on the default device."""
    rule = OptimConfig().rule
    groups = rule.pop("groups")
    mesh = make_mesh((1, 1), [jax.config.jax_default_device or jax.devices()[0]])
    learned, frozen = split_params(jax.device_put(params), groups)
    optimizer, _ = make_optimizer(learned, groups=groups, steps=10, **rule)
    learned, frozen = jax.device_put((learned, frozen), jax.NamedSharding(mesh, jax.P()))
    state = init_train_state(learned, frozen, optimizer, mesh)
    step = make_train_step(config, optimizer, 0, state, options)
    with jax.set_mesh(mesh):
        _, metrics = step(state, batch_of(frames, question))
    return metrics["loss"], metrics["grad_norm"]


def _compare_memory(rows: Rows, dtype: Any, eps: float) -> None:
    """The memory's kernels on the device against XLA's program on the CPU: one layer, full size."""
    if jax.default_backend() != "gpu":
        return
    videos, chunk, q = 2, 8, AdaCM2Config().qformer
    width = q.width // q.num_heads
    config = AdaCM2Config()
    plan, tokens = plan_for(config), config.vision.tokens_per_frame
    retention = Retention(
        recent=jnp.asarray(plan.recent[0]),
        older=jnp.asarray(plan.older[0]),
        seed=jnp.zeros(videos, jnp.uint32),
        max_older=int(plan.older.max()),
        ranking=plan.ranking,
    )
    rng = np.random.default_rng(0)

    def normal(count: int) -> np.ndarray:
        shape = chunk, videos, q.num_heads, count, width
        return rng.normal(size=shape).astype(np.float32).astype(dtype)

    index = np.tile(np.arange(chunk, dtype=np.int32)[:, None], videos)
    frames = Frames(normal(tokens), normal(tokens), index, np.ones((chunk, videos), bool))
    queries = Queries(normal(q.num_queries), normal(16), np.ones((videos, 16), bool))
    empty = init_memory(videos, q.num_heads, width, plan.capacity, tokens, dtype)

    def read(how: Callable) -> Any:
        return jax.jit(how)(empty, retention, frames, queries)

    mine, memory = _on(jax.devices()[0], lambda: read(by_kernels))
    other, expected = _on(jax.devices("cpu")[0], lambda: read(read_frames))
    wide = [each.astype(np.float32) for each in (mine, other)]
    # What is handed out is rounded once to the type, what it is added up from to float32.
    off, bound = _off(*wide), 4 * (eps + 2.0**-23 * len(plan.recent[0]) ** 0.5)
    # What a rounding decides may differ: a few tokens whose scores are nearly the same.
    kept = [set(map(tuple, _kept(each))) for each in (memory, expected)]
    alike = len(kept[0] & kept[1]) / len(kept[1])
    rows.add(
        f"memory's kernels, {jnp.dtype(dtype)}",
        right=off <= bound and alike > 0.95,
        off=off,
        bound=bound,
        tokens_alike=alike,
    )


def _kept(memory: VideoMemory) -> np.ndarray:
    """Video, frame and patch of every token that is kept."""
    kept = memory.in_time_order()
    video, place = np.nonzero(np.asarray(kept["live"]))
    return np.stack([video, kept["frame"][video, place], kept["patch"][video, place]], 1)


def _compare_vit(rows: Rows) -> None:
    """The ViT in bfloat16, plain and fused, against float32 on the CPU."""
    config = tiny()
    params = _on(jax.devices("cpu")[0], lambda: nn.unbox(init_params(config, jax.random.key(0))))
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 56, 56, 3), np.uint8)
    cpu = jax.devices("cpu")[0]
    exact = _on(cpu, lambda: steps.encode(AdaCM2(config), params, frames)).astype(np.float32)
    # A block rounds about eight results that are added to one another, at random.
    bound = 2.0**-8 * (8 * config.vision.depth) ** 0.5
    apart = unstacked(jax.tree.map(jnp.asarray, params))
    for name, fused, given in (
        ("plain", {"fused_vision": False}, params),
        ("fused", {}, params),
        ("fused, by blocks", {}, apart),
        ("epilogues, by blocks", {"fused_epilogues": True}, apart),
    ):
        half = dataclasses.replace(config, dtype="bfloat16", **fused)

        def encode(half=half, given=given):
            return steps.encoder(half)(AdaCM2(half), given, frames)

        found = _on(jax.devices()[0], encode)
        off = float(np.linalg.norm(found.astype(np.float32) - exact) / np.linalg.norm(exact))
        rows.add(f"ViT in bfloat16, {name}", right=off <= bound, off=off, bound=bound)
