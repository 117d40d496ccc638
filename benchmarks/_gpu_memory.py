"""Sections of gpu.py about memory and training: ``memory``, ``train``."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from adacm2_jax.config import MemoryConfig
from adacm2_jax.inference import steps
from adacm2_jax.models.adacm2 import AdaCM2, init_state
from adacm2_jax.models.params import split_params
from adacm2_jax.plan.flops import product_flops
from adacm2_jax.runs.experiment import OptimConfig
from adacm2_jax.sharding import make_mesh
from adacm2_jax.training.optim import make_optimizer
from adacm2_jax.training.step import StepConfig, init_train_state, make_train_step
from benchmarks._gpu import (
    ANSWERING,
    READING,
    Rows,
    Size,
    ask,
    batch_of,
    draw_params,
    pixels,
    seconds_of,
    turn,
)


def in_use() -> int | None:
    """Bytes that live arrays take on the card; None where the device does not say."""
    stats = jax.devices()[0].memory_stats()
    return stats and stats["bytes_in_use"]


def section_memory(rows: Rows, size: Size) -> None:
    """Bytes after T frames, by policy; ``full`` last, for longer videos until one does not fit."""
    config = size.config()
    params = draw_params(config, READING)
    chunk = size.chunk
    shape = (1, chunk, config.vision.tokens_per_frame, config.vision.width)
    features = jax.random.normal(jax.random.key(0), shape).astype(config.feature_dtype)
    policies = [("adacm2", MemoryConfig()), ("merge", MemoryConfig("merge", bank_frames=10))]
    policies += [(f"full, T {n}", MemoryConfig("full", max_frames=n)) for n in size.lengths]
    for name, memory in policies:
        if rows.late(name):
            continue
        own = dataclasses.replace(config, memory=memory)
        lengths = [memory.max_frames] if memory.policy == "full" else size.lengths
        try:
            with turn():
                _memory_of(rows, name, AdaCM2(own), params, features, lengths, size)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "ut of memory" not in str(error):
                raise
            rows.add(name, fits=False)
            return


def _memory_of(rows, name, model, params, features, lengths, size) -> None:
    asked = ask(model.config, 1, size.words)
    valid = np.ones(features.shape[:2], bool)
    state = init_state(model.config, jnp.zeros(1, jnp.int32))
    arguments = model, params, features, valid, asked, state
    compiled = steps.read.lower(*arguments).compile().memory_analysis()
    by_compiler = compiled.argument_size_in_bytes + compiled.temp_size_in_bytes
    seen = 0
    for frames in lengths:
        # The arrays of ``full`` have their size from the first frame on.
        end = min(frames, 2 * features.shape[1]) if name.startswith("full") else frames
        while seen < end:
            valid = np.arange(features.shape[1])[None] < end - seen
            state = steps.read(model, params, features, valid, asked, state)
            seen += int(valid.sum())
        jax.block_until_ready(state)
        stats = jax.devices()[0].memory_stats() or {}
        rows.add(
            name if name.startswith("full") else f"{name}, T {frames}",
            state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
            bytes_in_use=stats.get("bytes_in_use"),
            peak_bytes=stats.get("peak_bytes_in_use"),
            step_by_compiler=by_compiler,
            kept=int(state.memory.tokens_kept[0]),
            frames_read=seen,
        )


def section_train(rows: Rows, size: Size) -> None:
    """A step of configs/lvu.py: seconds at the largest batch that fits, memory by length."""
    for batch in size.batches:
        name = f"batch {batch}, T {size.frames}"
        if rows.late(name):
            continue
        if _step(rows, name, size, batch, size.frames, timed=True):
            name += ", epilogues"
            if not rows.late(name):
                _step(rows, name, size, batch, size.frames, timed=True, fused_epilogues=True)
            break
    for frames in (16, 1000) if not size.tiny else (4, 8):
        name = f"batch {size.batches[-1]}, T {frames}"
        if rows.late(name):
            continue
        _step(rows, name, size, size.batches[-1], frames, timed=False)


def _step(
    rows: Rows, name: str, size: Size, batch: int, frames: int, *, timed: bool, **fused: bool
) -> bool:
    """One row; returns whether the step fits."""
    config = size.config(**fused)
    rule = OptimConfig().rule
    groups = rule.pop("groups")
    mesh = make_mesh((1, 1), jax.devices()[:1])
    params = draw_params(config, READING + ANSWERING)
    learned, frozen = split_params(params, groups)
    learned = {path: leaf.astype(jnp.float32) for path, leaf in learned.items()}
    del params
    learned, frozen = jax.device_put((learned, frozen), jax.NamedSharding(mesh, jax.P()))
    optimizer, _ = make_optimizer(learned, groups=groups, steps=100, **rule)
    state = init_train_state(learned, frozen, optimizer, mesh)
    options = StepConfig(chunk=min(10, frames))
    question = ask(config, batch, 2 * size.words)
    question = dataclasses.replace(
        question,
        qformer_ids=question.qformer_ids[:, : size.words],
        qformer_mask=question.qformer_mask[:, : size.words],
    )
    clips = batch_of(pixels(config, batch, frames), question)
    step = make_train_step(config, optimizer, 0, state, options)
    with jax.set_mesh(mesh):
        traced = step.trace(state, clips)
        flops = product_flops(traced.jaxpr)
        try:
            compiled = traced.lower().compile()
            analysis = compiled.memory_analysis()
            with turn():
                state, metrics = compiled(state, clips)
                loss = float(metrics["loss"])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "ut of memory" not in str(error):
                raise
            rows.add(name, fits=False)
            return False

        def run():
            nonlocal state
            state, metrics = compiled(state, clips)
            return metrics

        values: dict = {}
        if timed:
            seconds, spread = seconds_of(run, size.least, windows=3)
            share = rows.share(flops / seconds, "product", "flops_a_second")
            values = dict(seconds=seconds, clips_a_second=batch / seconds, share=share)
            values |= dict(spread=spread)
    stats = jax.devices()[0].memory_stats() or {}
    rows.add(
        name,
        fits=True,
        loss=loss,
        tflop=flops / 1e12,
        **values,
        temporaries=analysis.temp_size_in_bytes,
        peak_bytes=stats.get("peak_bytes_in_use"),
    )
    return True
