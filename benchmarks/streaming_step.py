"""Our compiled streaming step against the same computation in eager PyTorch.

Full-size Q-Former (768 wide, 12 layers, 32 queries, 12 text tokens) on features of 257 × 1408, one
video, float32, random weights (the same on both sides), the memory at its settled length. Ours
reads a chunk of F frames a call, PyTorch frame by frame, written in the two ways of
``_torch_qformer.py``. Encoder and language model take no part.
"""

import argparse
import itertools

import _paired  # before JAX: it sets the number of threads
import _report
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from _torch_qformer import StreamingQFormer

from adacm2_jax import config as configs
from adacm2_jax.memory.policies import retention_counts
from adacm2_jax.models.adacm2 import AdaCM2, Question, init_params, init_state
from adacm2_jax.models.params import unstacked

TEXT_TOKENS = 12
CHUNKS = (1, 8, 16)
STYLES = ("plain", "fused")
# Float32 keeps 2⁻²⁴ of a value; the longest chain of sums in the step is 12 layers of products over
# 3072 terms, whose rounding errors grow like the square root of their number; values reach about 8.
TOLERANCE = 2.0**-24 * (12 * 3072) ** 0.5 * 8


def model_config(preset: str) -> configs.AdaCM2Config:
    """The full-size model with the encoder and the language model cut down to fit in memory."""
    return configs.instructblip_vicuna_7b(
        memory=configs.memory_preset(preset),
        vision=configs.VisionConfig(depth=1),
        llm=configs.LlamaConfig(
            vocab_size=8, width=64, depth=1, num_heads=2, num_kv_heads=2, mlp_width=64
        ),
    )


def random_params(config: configs.AdaCM2Config) -> dict:
    """Weights as numpy arrays; nothing is left at zero or one, where it would go unnoticed."""
    shapes = nn.unbox(jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)
        return values + np.float32(path[-1].key == "scale")

    needed = {name: shapes[name] for name in ("ln_vision", "temporal_embed", "qformer")}
    return jax.tree_util.tree_map_with_path(draw, needed)


def gflop_per_frame(config: configs.AdaCM2Config, live: int) -> float:
    """Matrix products alone, counted as 2 operations a multiplication and addition."""
    q, v = config.qformer, config.vision
    rows = q.num_queries + TEXT_TOKENS
    self_attention = 4 * rows * q.width**2 + 2 * rows**2 * q.width
    feed_forward = 2 * rows * q.width * q.mlp_width
    frame = 2 * v.tokens_per_frame * v.width * q.width
    cross = 2 * q.num_queries * q.width**2 + 2 * q.num_queries * live * q.width
    total = q.depth * (self_attention + feed_forward) + q.num_cross_layers * (frame + cross)
    return 2 * total / 1e9


def time_ordered(memory) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of our memory as PyTorch's side holds them, twice float32[L, n, H, D]."""
    slots = np.asarray(memory.slots)[:, 0, : int(memory.length[0, 0])]

    def ordered(buffer):
        return np.take_along_axis(np.asarray(buffer)[:, 0], slots[:, None, :, None], axis=2)

    return ordered(memory.key).swapaxes(1, 2), ordered(memory.value).swapaxes(1, 2)


class Benchmark:
    def __init__(self, preset: str):
        self.config = model_config(preset)
        params = random_params(self.config)
        rng = np.random.default_rng(1)
        q = self.config.qformer
        ids = rng.integers(0, q.vocab_size, TEXT_TOKENS)
        mask = jnp.ones((1, TEXT_TOKENS), bool)
        tokens = jnp.asarray(ids[None], jnp.int32)
        question = Question(tokens, mask, tokens, mask)
        self.params = unstacked(jax.tree.map(jnp.asarray, params))
        model = AdaCM2(self.config)

        def read(params, features, state):
            valid = jnp.ones(features.shape[:2], bool)
            return model.apply({"params": params}, features, valid, question, state, method="read")

        self.read = jax.jit(read, donate_argnums=2)
        memory = self.config.memory
        ratios = [configs.as_fraction(r) for r in (memory.recent_ratio, memory.conserve_ratio)]
        counts = {}

        def count(live):
            if live not in counts:
                counts[live] = retention_counts(live, *ratios)
            return counts[live]

        self.torch = {
            style: StreamingQFormer(params, self.config, count, ids, style == "fused").eval()
            for style in STYLES
        }
        vision = self.config.vision
        shape = (1, max(CHUNKS), vision.tokens_per_frame, vision.width)
        self.features = rng.standard_normal(shape, np.float32)
        self.state = self.settle()

    def settle(self):
        """Reads frames until the memory has found its length."""
        state = init_state(self.config, jnp.zeros((1,), jnp.int32))
        features = jnp.asarray(self.features)
        before = -1
        while before != (length := int(state.memory.length[0, 0])):
            before, state = length, self.read(self.params, features, state)
        return jax.tree.map(np.asarray, state)

    @property
    def live(self) -> int:
        """Tokens that a layer attends to."""
        return int(self.state.memory.length[0, 0]) + self.config.vision.tokens_per_frame

    def run(self, chunk: int, frames: int, style: str) -> dict:
        """Both sides from the settled memory on: first that they agree, then how long they take."""
        features = jnp.asarray(self.features[:, :chunk])
        parts = torch.from_numpy(self.features[0, :chunk])
        start = jax.tree.map(jnp.array, self.state)
        seen = int(self.state.frames_seen[0])
        model = self.torch[style]
        model.load_memory(*time_ordered(self.state.memory))

        def ours():
            nonlocal start
            start = jax.block_until_ready(self.read(self.params, features, start))
            return start.queries

        @torch.inference_mode()
        def theirs():
            for i in range(chunk):
                queries = model(parts[i], seen + i)
            return queries

        difference = np.abs(np.asarray(ours())[0] - theirs().numpy()).max()
        assert difference < TOLERANCE, f"the two sides differ by {difference:.1e}"
        result = _paired.paired(ours, theirs, rounds=max(6, frames // chunk))
        for name in ("ours", "theirs"):
            result[name] /= chunk
        return result | dict(difference=float(difference))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=64, help="timed at each chunk length")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()

    results = _paired.header()
    print("preset  live   F  torch  GFLOP  ours ms  torch ms  ratio (quartiles)  share of peak")
    for preset in ("eq8", "eq6"):
        benchmark = Benchmark(preset)
        gflop = gflop_per_frame(benchmark.config, benchmark.live)
        for chunk, style in itertools.product(CHUNKS, STYLES):
            row = dict(preset=preset, live=benchmark.live, chunk=chunk, style=style, gflop=gflop)
            row |= benchmark.run(chunk, args.frames, style)
            results["rows"].append(row)
            print(
                f"{preset:6} {row['live']:5} {chunk:3} {style:6} {gflop:6.1f} "
                f"{row['ours'] * 1e3:8.1f} "
                f"{row['theirs'] * 1e3:9.1f}  {_report.ratio(row):>17}"
                f"  {_paired.shares(row, results['peak'])}",
                flush=True,
            )
    _report.write_json(args.json, results)


if __name__ == "__main__":
    main()
