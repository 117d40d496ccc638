"""Writing a token with the language model's matrices in eight bits, against float32, on this CPU.

The LLaMA of ``decode_step.py``, one row and greedy. A CPU has no product of float32 and int8: XLA
widens the matrices before it multiplies, so that nothing is spared there but the memory that the
parameters rest in. What a GPU does is in docs/porting.md.
"""

import argparse
import dataclasses
import functools

import _paired  # before JAX: it sets the number of threads
import _report
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from decode_step import CONFIG, MODEL, PROMPT, TOKENS, write
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from adacm2_jax.config import QUANTIZED
from adacm2_jax.models.llama import Llama
from adacm2_jax.models.params import unstacked
from adacm2_jax.models.quantized import quantize_fresh


def in_eight_bits(params: dict, model: Llama) -> dict:
    """Stacked parameters as ``model`` has them."""
    place = SingleDeviceSharding(jax.devices()[0])
    shapes = nn.unbox(jax.eval_shape(lambda key: model.init(key, *first()), jax.random.key(0)))
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes["params"]
    )
    flat, like = (traverse_util.flatten_dict(tree, sep="/") for tree in (params, wanted))
    return traverse_util.unflatten_dict(quantize_fresh(flat, like), sep="/")


def first() -> tuple[jax.Array, ...]:
    return jnp.zeros((1, 1, CONFIG.width)), jnp.ones((1, 1), bool), jnp.zeros((1, 1), jnp.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()

    results = _paired.header()
    ids = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, PROMPT)))
    made = nn.unbox(jax.jit(lambda key: MODEL.init(key, *first()))(jax.random.key(0)))["params"]
    print("kept as  parameters MB  ours ms  float32 ms  float32 / ours (quartiles)")
    for kind in QUANTIZED:
        model = Llama(dataclasses.replace(CONFIG, quantize=kind))
        small = unstacked({"llm": in_eight_bits(jax.tree.map(jnp.copy, made), model)})["llm"]
        exact = unstacked({"llm": jax.tree.map(jnp.copy, made)})["llm"]

        def run(params: dict, model: Llama) -> np.ndarray:
            return np.asarray(write(params, ids, TOKENS, 1, model))

        row = dict(kind=kind, bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(small)))
        row |= _paired.paired(
            functools.partial(run, small, model), functools.partial(run, exact, MODEL), args.rounds
        )
        results["rows"].append(row)
        print(
            f"{kind:7} {row['bytes'] / 1e6:14.0f} {row['ours'] * 1e3:8.1f} "
            f"{row['theirs'] * 1e3:11.1f}  {_report.ratio(row):>17}",
            flush=True,
        )
    _report.write_json(args.json, results)


if __name__ == "__main__":
    main()
