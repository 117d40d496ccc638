"""Writing a token with each layer's weights on their own, against weights in one stack.

A LLaMA of the size of SmolLM2-135M (30 layers of width 576, nine heads and three for keys and
values) with random float32 weights writes tokens by ``generate.search``, one row and greedy, as an
answer is written; beside it the same with its layers stacked, as they are trained and stored
(``params.unstacked``). Both must write the same tokens.

Then by five beams for four videos, whose prompts are shared (``KVCache.branched``), against a cache
that holds the prompt once a beam.
"""

import argparse
import functools
import unittest.mock

import _paired  # before JAX: it sets the number of threads
import _report
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adacm2_jax.config import LlamaConfig
from adacm2_jax.inference.generate import GenerationConfig, search
from adacm2_jax.models.llama import KVCache, Llama, init_cache
from adacm2_jax.models.params import unstacked

CONFIG = LlamaConfig(
    vocab_size=49152,
    width=576,
    depth=30,
    num_heads=9,
    num_kv_heads=3,
    mlp_width=1536,
    tie_embeddings=True,
)
PROMPT, TOKENS = 64, 16
VIDEOS, BEAMS = 4, 5
MODEL = Llama(CONFIG)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def write(
    params: dict, ids: jax.Array, tokens: int, beams: int = 1, model: Llama = MODEL
) -> jax.Array:
    """int32[B, tokens]: what follows each prompt of int32[B, PROMPT]."""
    run = functools.partial(model.apply, {"params": params})
    cache = init_cache(CONFIG, len(ids), PROMPT + tokens - 1, jnp.float32)
    mask = jnp.ones(ids.shape, bool)
    positions = jnp.broadcast_to(jnp.arange(PROMPT), ids.shape)
    embeddings = run(ids, jnp.float32, method="embed")
    hidden, cache = run(embeddings, mask, positions, cache)

    def decode(token, cache):
        embedding = run(token[:, None], jnp.float32, method="embed")
        real = jnp.ones((len(token), 1), bool)
        hidden, cache = run(embedding, real, cache.tokens[:, None], cache)
        return run(hidden[:, 0], method="logits"), cache

    first = run(hidden[:, -1], method="logits")
    options = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, eos_ids=(), num_beams=beams
    )
    return search(first, cache, decode, options).ids[:, 0]


@functools.partial(jax.jit, static_argnums=2)
def write_apart(params: dict, ids: jax.Array, tokens: int) -> jax.Array:
    """:func:`write` by beams that hold a prompt each."""
    with unittest.mock.patch.object(KVCache, "branched", _repeated):
        return write.__wrapped__(params, ids, tokens, BEAMS)


def _repeated(cache: KVCache, count: int, room: int) -> KVCache:
    leaves = {name: getattr(cache, name) for name in ("key", "value", "mask")}
    return cache.replace(**jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), leaves))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()

    results = _paired.header()
    ids = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, PROMPT)))
    start = jnp.zeros((1, 1, CONFIG.width)), jnp.ones((1, 1), bool), jnp.zeros((1, 1), jnp.int32)

    def make() -> dict:
        key = jax.random.key(0)
        return nn.unbox(jax.jit(lambda key: MODEL.init(key, *start))(key))["params"]

    stacked, apart = make(), unstacked({"llm": make()})["llm"]
    print("tokens after the prompt  ours ms  stacked ms  ratio (quartiles)")
    for tokens in (1, TOKENS):
        ours, theirs = (
            functools.partial(lambda *given: np.asarray(write(*given)), params, ids, tokens)
            for params in (apart, stacked)
        )
        assert np.array_equal(ours(), theirs()), "the two sides write different tokens"
        row = dict(tokens=tokens) | _paired.paired(ours, theirs, rounds=args.rounds)
        results["rows"].append(row)
        print(
            f"{tokens:24} {row['ours'] * 1e3:8.1f} {row['theirs'] * 1e3:11.1f} "
            f" {_report.ratio(row):>17}",
            flush=True,
        )
    ids = jnp.asarray(np.random.default_rng(1).integers(0, CONFIG.vocab_size, (VIDEOS, PROMPT)))
    ours = lambda: np.asarray(write(apart, ids, TOKENS, BEAMS))  # noqa: E731
    theirs = lambda: np.asarray(write_apart(apart, ids, TOKENS))  # noqa: E731
    row = dict(beams=BEAMS) | _paired.paired(ours, theirs, rounds=args.rounds)
    results["rows"].append(row)
    print(
        f"{BEAMS} beams, {VIDEOS} videos: {row['ours'] * 1e3:.1f} ms, with a prompt a beam "
        f"{row['theirs'] * 1e3:.1f} ms, {_report.ratio(row)}"
    )
    _report.write_json(args.json, results)


if __name__ == "__main__":
    main()
