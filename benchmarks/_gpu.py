"""What the sections of gpu.py share: rows, sizes, random parameters, and how time is taken."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from adacm2_jax.config import AdaCM2Config, instructblip_vicuna_7b, tiny
from adacm2_jax.models.adacm2 import Question, init_params
from adacm2_jax.models.params import frozen_dtype
from adacm2_jax.models.quantized import kind_of
from adacm2_jax.plan.flops import product_flops
from adacm2_jax.training.step import Batch

WORDS = 32
#: Parameters that read frames; the others answer.
READING = ("vision", "ln_vision", "temporal_embed", "qformer")
ANSWERING = ("temporal_embed", "language_projection", "llm")


class Rows:
    """What a section has measured: each row is printed and written when it is there.

    Args:
      section: its name.
      path: a file of JSON lines, appended to.
      seconds: that the section may take.
      only: an expression that the names of wanted rows match from their start.
    """

    def __init__(self, section: str, path: pathlib.Path, seconds: float, only: str = ""):
        self.section, self.path, self._only = section, path, re.compile(only)
        self._end = time.monotonic() + seconds

    def add(self, name: str, **values: Any) -> None:
        """A row; floats are printed with four digits."""
        device = jax.devices()[0]
        shown = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in values.items()
        )
        print(f"{self.section}: {name}: {', '.join(shown)}", flush=True)
        about = dict(card=device.device_kind, platform=device.platform, jax=jax.__version__)
        row = dict(section=self.section, name=name) | about | values
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def late(self, name: str) -> bool:
        """Whether one more is not wanted, or there is no time for it, which is said."""
        if not self._only.match(name):
            return True
        if time.monotonic() < self._end:
            return False
        print(f"{self.section}: {name}: not measured, the time is used", flush=True)
        return True

    def ceiling(self, name: str, unit: str) -> float | None:
        """The newest ceiling of this card that has been measured, by the name of its row."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        found = [
            row[unit]
            for row in map(json.loads, lines)
            if (row["section"], row["name"]) == ("ceilings", name)
            and row["card"] == jax.devices()[0].device_kind
        ]
        return found[-1] if found else None

    def share(self, rate: float, name: str, unit: str) -> float | None:
        """A rate divided by the measured ceiling; None where that was not measured."""
        ceiling = self.ceiling(name, unit)
        return rate / ceiling if ceiling else None


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured: the full model or a tiny one with fewer of everything.

    ``images`` are [videos, frames] for the ViT alone; ``streams`` are preset, videos, questions of
    each, frames of a chunk.
    """

    tiny: bool
    copy: int
    product: int
    least: float
    images: tuple[tuple[int, int], ...]
    chunk: int
    streams: tuple[tuple[str, int, int, int], ...]
    new_tokens: int
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    frames: int

    @classmethod
    def named(cls, name: str) -> "Size":
        """``full`` or ``tiny``."""
        if name == "tiny":
            return cls(
                tiny=True,
                copy=2**16,
                product=64,
                least=0.005,
                images=((1, 2),),
                chunk=2,
                streams=(("eq8", 1, 2, 2), ("eq6", 1, 1, 2)),
                new_tokens=3,
                lengths=(4, 12),
                batches=(2,),
                frames=6,
            )
        return cls(
            tiny=False,
            copy=2**30,
            product=8192,
            least=0.25,
            images=((1, 16), (8, 16), (1, 64), (1, 8)),
            chunk=16,
            streams=(
                ("eq8", 1, 1, 16),
                ("eq8", 8, 1, 16),
                ("eq6", 1, 1, 16),
                ("eq8", 1, 8, 16),
                ("eq8", 1, 1, 64),
                ("eq8", 32, 1, 16),
                ("eq6", 8, 1, 16),
                ("eq8", 1, 1, 8),
                ("eq8", 1, 1, 32),
                ("eq8", 8, 8, 16),
            ),
            new_tokens=32,
            lengths=(20, 100, 1000, 10_000),
            batches=(64, 32, 16, 8, 4),
            frames=100,
        )

    def config(self, **overrides: Any) -> AdaCM2Config:
        """The model in bfloat16."""
        make = tiny if self.tiny else instructblip_vicuna_7b
        texts = {} if self.tiny else dict(max_text_len=WORDS, max_answer_len=16)
        return make(**(dict(dtype="bfloat16") | texts | overrides))

    @property
    def words(self) -> int:
        return 8 if self.tiny else WORDS


def draw_params(config: AdaCM2Config, parts: tuple[str, ...], seed: int = 0) -> dict:
    """Random parameters of some parts on the device, one after the other, as inference has them."""
    shapes = nn.unbox(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    flat = traverse_util.flatten_dict({part: shapes[part] for part in parts}, sep="/")

    def draw(key: jax.Array, path: str, leaf: Any) -> jax.Array:
        if kind_of(leaf.dtype):
            return jax.random.randint(key, leaf.shape, -127, 128, jnp.int8).astype(leaf.dtype)
        kernel = flat.get(path.removesuffix("scale") + "kernel")
        if path.endswith("scale") and kernel is not None:
            return jnp.full(leaf.shape, 0.02 / 73, leaf.dtype)  # 73: the deviation of those above
        dtype = frozen_dtype(config, path)
        noise = jax.random.normal(key, leaf.shape, dtype) * jnp.asarray(0.02, dtype)
        return noise + 1 if path.endswith("scale") else noise

    drawn = {}
    for number, (path, leaf) in enumerate(sorted(flat.items())):
        key = jax.random.fold_in(jax.random.key(seed), number)
        drawn[path] = jax.jit(draw, static_argnums=(1, 2))(key, path, leaf)
    jax.block_until_ready(drawn)
    return traverse_util.unflatten_dict(drawn, sep="/")


def ask(config: AdaCM2Config, rows: int, words: int) -> Question:
    """Random questions without padding."""
    rng = np.random.default_rng(2)
    text = jnp.asarray(rng.integers(1, config.qformer.vocab_size, (rows, words)), jnp.int32)
    prompt = jnp.asarray(rng.integers(3, config.llm.vocab_size - 1, (rows, words)), jnp.int32)
    mask = jnp.ones((rows, words), bool)
    return Question(text, mask, prompt, mask)


def pixels(config: AdaCM2Config, *shape: int) -> jax.Array:
    """Random frames on the device, uint8[…, side, side, 3]."""
    side = config.vision.image_size
    draw = jax.jit(lambda key: jax.random.bits(key, (*shape, side, side, 3), jnp.uint8))
    return draw(jax.random.key(3))


def batch_of(frames: Any, question: Question) -> Batch:
    """Clips with their whole text as targets, but its first half."""
    count, length = question.llm_ids.shape
    targets = jnp.broadcast_to(jnp.arange(length) >= length // 2, (count, length))
    valid = jnp.ones(frames.shape[:2], bool)
    return Batch(frames, valid, jnp.zeros(count, jnp.uint32), question, targets)


_depth = 0


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """The card to oneself, among all that name the same file in ``GPU_BENCHMARK_LOCK``."""
    global _depth
    path = os.environ.get("GPU_BENCHMARK_LOCK")
    if not path or _depth:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1


def seconds_of(
    call: Callable[[], Any],
    least: float,
    windows: int = 5,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> tuple[float, float]:
    """How long a call takes when the host never waits between calls.

    Args:
      call: starts work on the device and returns what comes of it.
      least: seconds of a window, after three calls to warm up; one, where it takes as long.
      windows: of which the median counts; two, where a call takes eight times as long.
      wait: until what a call returned has been computed.

    Returns:
      The median, and (highest − lowest) / median of all windows.
    """
    wait(call())  # compiles
    with turn():
        for _ in range(3):
            begun = time.perf_counter()
            wait(call())
            if (once := time.perf_counter() - begun) > least:
                break
        count, found = max(1, int(least / max(once, 1e-9))), []
        for _ in range(2 if once > 8 * least else windows):
            begun = time.perf_counter()
            for _ in range(count):
                result = call()
            wait(result)
            found.append((time.perf_counter() - begun) / count)
    middle = statistics.median(found)
    return middle, (max(found) - min(found)) / middle


def answering(
    seconds: Callable[[int], tuple[float, float]], batch: int, tokens: int
) -> dict[str, float]:
    """The first token and each after it, from the ``seconds`` that so many tokens take."""
    first, _ = seconds(1)
    whole, spread = seconds(tokens + 1)
    step = (whole - first) / tokens
    return dict(
        first_token_ms=first * 1e3,
        step_ms=step * 1e3,
        tokens_a_second=batch / step,
        spread=spread,
    )


def flops_of(function: Callable, *arguments: Any) -> float:
    """Of all matrix products of a call."""
    return product_flops(jax.jit(function).trace(*arguments).jaxpr)
