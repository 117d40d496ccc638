"""Sections ``ceilings``, ``stream``, ``decode`` and ``trace`` of gpu.py: how fast is inference?"""

import collections
import dataclasses
import functools
import itertools
import math
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp

from adacm2_jax.config import AdaCM2Config, memory_preset
from adacm2_jax.inference import steps
from adacm2_jax.inference.generate import GenerationConfig
from adacm2_jax.models import int8_product
from adacm2_jax.models.adacm2 import AdaCM2, StreamState, init_state, repeat_rows
from adacm2_jax.models.params import unstacked
from benchmarks._gpu import (
    ANSWERING,
    READING,
    Rows,
    Size,
    answering,
    ask,
    draw_params,
    flops_of,
    pixels,
    seconds_of,
)


def section_ceilings(rows: Rows, size: Size) -> None:
    """What the card reaches with a copy and with a product."""
    values = jax.random.normal(jax.random.key(0), (size.copy,), jnp.bfloat16)
    copy = jax.jit(jnp.negative)
    seconds, spread = seconds_of(lambda: copy(values), size.least)
    rows.add("copy", bytes_a_second=2 * values.nbytes / seconds, spread=spread)
    for side in (size.product, size.product // 2):
        a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in range(2))
        product = jax.jit(jnp.matmul)
        seconds, spread = seconds_of(lambda a=a, b=b, run=product: run(a, b), size.least)
        name = "product" if side == size.product else f"product of {side}"
        rows.add(name, flops_a_second=2 * side**3 / seconds, side=side, spread=spread)


# --- stream --------------------------------------------------------------------------------------


#: How the ViT is computed: the name in rows, and what of the model is set for it.
WAYS: dict[str, dict[str, bool]] = {
    "fused True": {},
    "epilogues": {"fused_epilogues": True},
    "fused False": {"fused_vision": False},
}


def section_stream(rows: Rows, size: Size) -> None:
    """Frames a second of the parts and of all together, most wanted first."""
    config = size.config()
    params = draw_params(config, READING)
    _vit(rows, size, params, size.images[0], "fused True", ", stacked")
    params = unstacked(params)
    alone = _vit_alone(rows, size, params)
    for case in size.streams:
        if rows.late(_name(*case)):
            continue
        _stream(rows, size, params, *case, alone)


def _name(preset: str, videos: int, questions: int, chunk: int) -> str:
    return f"{preset}, {videos} videos, {questions} questions, chunk {chunk}"


def _vit_alone(rows: Rows, size: Size, params: dict) -> dict[str, float]:
    """The ViT by images and ways; the best frames a second of each way."""
    best = dict.fromkeys(WAYS, 0.0)
    for images, way in itertools.product(size.images, WAYS):
        best[way] = max(best[way], _vit(rows, size, params, images, way))
    return best


def _vit(
    rows: Rows, size: Size, params: dict, images: tuple[int, int], way: str, how: str = ""
) -> float:
    """Frames a second of the ViT on [videos, frames]; 0 where there is no time for it."""
    count = math.prod(images)
    name = f"ViT, {count} images, {way}{how}"
    if rows.late(name):
        return 0.0
    config = size.config(**WAYS[way])
    model, frames, encode = AdaCM2(config), pixels(config, *images), steps.encoder(config)
    begun = time.perf_counter()
    seconds, spread = seconds_of(lambda: encode(model, params, frames), size.least)
    taken = time.perf_counter() - begun
    rate = flops_of(lambda p, f: steps.encode(model, p, f), params, frames) / seconds
    share = rows.share(rate, "product", "flops_a_second")
    rows.add(name, frames_a_second=count / seconds, share=share, spread=spread, measured_in=taken)
    return count / seconds


def _stream(
    rows: Rows,
    size: Size,
    params: dict,
    preset: str,
    videos: int,
    questions: int,
    chunk: int,
    alone: dict[str, float],
) -> None:
    way = max(alone, key=lambda way: alone[way])
    config = size.config(memory=memory_preset(preset), **WAYS[way])
    frames, encode = pixels(config, videos, chunk), steps.encoder(config)
    models = {
        ours: AdaCM2(dataclasses.replace(config, fused_memory=ours)) for ours in (False, True)
    }
    asked = ask(config, videos * questions, size.words)
    valid = jnp.ones((videos, chunk), bool)
    features = encode(models[False], params, frames)
    state = repeat_rows(init_state(config, jnp.zeros(videos, jnp.int32)), questions)

    def read(ours: bool) -> StreamState:
        nonlocal state
        state = steps.read(models[ours], params, features, valid, asked, state)
        return state

    def together() -> StreamState:
        nonlocal state
        encoded = encode(models[ours], params, frames)
        state = steps.read(models[ours], params, encoded, valid, asked, state)
        return state

    count, begun = videos * chunk, time.perf_counter()
    reading = {ours: seconds_of(lambda ours=ours: read(ours), size.least)[0] for ours in models}
    ours = reading[True] < reading[False]
    both, spread = seconds_of(together, size.least)
    rows.add(
        _name(preset, videos, questions, chunk),
        frames_a_second=count / both,
        of_the_vit_alone=count / both / max(alone.values()) if any(alone.values()) else None,
        without_vit_ms_a_frame=reading[False] / count * 1e3,
        without_vit_fused_memory_ms_a_frame=reading[True] / count * 1e3,
        vision=way,
        fused_memory=ours,
        spread=spread,
        measured_in=time.perf_counter() - begun,
    )


# --- decode --------------------------------------------------------------------------------------


#: Rows, beams, kind of the language model's matrices, which are drawn anew for each kind.
DECODED = ((1, 1, "int8"), (1, 1, ""), (8, 1, ""), (1, 5, ""), (8, 5, ""), (1, 1, "stacked"))


#: Of the kernel that multiplies by a matrix of eight bits.
SHAPES = (
    int8_product.Shape(ahead=4),
    int8_product.Shape(),
    int8_product.Shape(parts=16, ahead=4),
    int8_product.Shape(tall=64, parts=16, ahead=4),
    int8_product.Shape(wide=512, tall=16, parts=64, ahead=4),
    int8_product.Shape(wide=128, tall=64, parts=16, ahead=4),
    int8_product.Shape(parts=16, ahead=2),
    int8_product.Shape(tall=64, parts=32),
)


def _products(rows: Rows, size: Size) -> None:
    """A row by matrices of eight bits one after the other, by XLA and by our kernel in several
    shapes, of which the fastest is taken for what comes after."""
    c = size.config().llm
    count, best = 2 if size.tiny else 8, float("inf")
    up, down = (
        jax.random.randint(jax.random.key(1), (count, *shape), -127, 128, jnp.int8)
        for shape in ((c.width, c.mlp_width), (c.mlp_width, c.width))
    )
    up, down = [*up], [*down]
    row = jax.random.normal(jax.random.key(0), (1, c.width)).astype(jnp.bfloat16)

    def chain(multiply, row, up, down):
        for one, other in zip(up, down, strict=True):
            row = (multiply(row, one) * 1e-4).astype(row.dtype)
            row = (multiply(row, other) * 1e-4).astype(row.dtype)
        return row

    ways = {"XLA": int8_product.plain}
    if jax.default_backend() == "gpu":
        ways |= {repr(s): functools.partial(int8_product.by_kernel, shape=s) for s in SHAPES}
    for name, multiply in ways.items():
        if rows.late(name := f"eight bits by {name}"):
            continue
        run = jax.jit(functools.partial(chain, multiply))
        seconds, spread = seconds_of(lambda run=run: run(row, up, down), size.least / 4, 3)
        read = 2 * count * c.width * c.mlp_width / seconds
        share = rows.share(read, "copy", "bytes_a_second")
        rows.add(name, us_a_matrix=seconds / 2 / count * 1e6, share=share, spread=spread)
        if "Shape" in name and seconds < best:
            best, int8_product.SHAPE = seconds, multiply.keywords["shape"]


def section_decode(rows: Rows, size: Size) -> None:
    """The first token and those after it, by rows and beams; in eight bits and with stacked layers,
    too."""
    _products(rows, size)
    made: tuple[str, dict] = ("", {})
    for batch, beams, kind in DECODED:
        name = f"{batch} rows, {beams} beams" + (f", {kind}" if kind else "")
        if rows.late(name):
            continue
        config = size.config()
        quantize = "int8" if kind == "int8" else ""
        config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, quantize=quantize))
        if not made[1] or made[0] != kind:
            made = ("", {})  # the card has room for one
            params = draw_params(config, ANSWERING)
            made = (kind, params if kind == "stacked" else unstacked(params))
            del params
        _decode(rows, name, size, config, made[1], batch, beams)


def _decode(
    rows: Rows,
    name: str,
    size: Size,
    config: AdaCM2Config,
    params: dict,
    batch: int,
    beams: int,
) -> None:
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params["llm"]))
    table = params["llm"]["token_embed"].nbytes  # one row of it is read
    model = steps.any_policy(config)
    queries = jax.random.normal(
        jax.random.key(0), (batch, config.qformer.num_queries, config.qformer.width)
    ).astype(config.memory_dtype)
    question = ask(config, batch, size.words)

    def seconds(tokens: int) -> tuple[float, float]:
        options = GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, num_beams=beams, eos_ids=()
        )
        arguments = queries, question, options, jax.random.key(0), jnp.arange(batch)
        return seconds_of(lambda: steps.answer(model, params, *arguments), size.least, windows=3)

    begun = time.perf_counter()
    found = answering(seconds, batch, size.new_tokens)
    rows.add(
        name,
        **found,
        # Reading every weight once is the least that a step can do.
        share=rows.share((weights - table) / found["step_ms"] * 1e3, "copy", "bytes_a_second"),
        weights_bytes=weights,
        shape=repr(int8_product.SHAPE) if config.llm.quantize else None,
        measured_in=time.perf_counter() - begun,
    )


# --- trace ---------------------------------------------------------------------------------------


def section_trace(rows: Rows, size: Size) -> None:
    """Ten chunks of one video and of eight: which kernels take the time, and how many there are."""
    for videos, fused in ((1, True), (8, True), (1, False)):
        name = f"{videos} videos, fused {fused}"
        if rows.late(name):
            continue
        config = size.config(fused_vision=fused, fused_memory=fused)
        params = unstacked(draw_params(config, READING))
        model, frames = AdaCM2(config), pixels(config, videos, size.chunk)
        asked = ask(config, videos, size.words)
        valid = jnp.ones(frames.shape[:2], bool)
        state = init_state(config, jnp.zeros(videos, jnp.int32))

        def chunk(state, model=model, params=params, frames=frames, valid=valid, asked=asked):
            features = steps.encode(model, params, frames)
            return steps.read(model, params, features, valid, asked, state)

        for _ in range(3):
            state = jax.block_until_ready(chunk(state))
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(10):
                    state = chunk(state)
                jax.block_until_ready(state)
            kernels = kernels_of(pathlib.Path(folder))
        if not kernels:
            rows.add(name, kernels=None)
            continue
        total = sum(taken for taken, _ in kernels.values())
        launches = sum(count for _, count in kernels.values())
        rows.add(name, device_ms_a_chunk=total / 10 / 1e6, launches_a_chunk=launches / 10)
        for kernel, (taken, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:20]:
            rows.add(
                f"{name}: {kernel[:60]}",
                ms_a_chunk=taken / 10 / 1e6,
                launches_a_chunk=count / 10,
                share=taken / total,
            )


def kernels_of(folder: pathlib.Path) -> dict[str, tuple[float, int]]:
    """Nanoseconds and launches of every kernel in a trace; empty where no GPU was."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    found[event.name].append(event.duration_ns)
    return {name: (sum(times), len(times)) for name, times in found.items()}
