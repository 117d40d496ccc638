"""Our side of a comparison: parameters by the product's tables, the Q-Former layer by layer."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from adacm2_jax.config import AdaCM2Config, MemoryConfig, QFormerConfig
from adacm2_jax.memory.policies import retention_plan
from adacm2_jax.memory.slots import (
    Frames,
    Retention,
    attention_probs,
    init_memory,
    live_slots,
)
from adacm2_jax.models.adacm2 import init_params
from adacm2_jax.models.qformer import Group, QFormer
from adacm2_jax.port.rules import Part, Piece, Table, match

#: Path → shape of parameters of ours, or name → shape of tensors.
Shapes = dict[str, tuple[int, ...]]


def param_shapes(config: AdaCM2Config) -> Shapes:
    """Of all parameters of ours, by path."""
    boxed = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    flat = traverse_util.flatten_dict(nn.unbox(boxed), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def params_by_table(
    table: Table, shapes: Shapes, theirs: Shapes, read: Callable[[str, slice], np.ndarray]
) -> dict[str, np.ndarray]:
    """Flat parameters of ours from PyTorch's tensors; every tensor must have a use.

    ``read`` returns some rows of a tensor.
    """

    def values(piece: Piece) -> np.ndarray:
        return piece.layout.to_ours(read(piece.name, piece.rows), piece.shape)

    params = {}
    for path, (_, pieces) in match(shapes, [Part("the oracle", table, theirs)]).items():
        layers = [values(piece) for piece in pieces]
        stacked = layers[0].shape != shapes[path]
        params[path] = np.stack(layers) if stacked else layers[0]
    return params


def empty_memory(config: QFormerConfig, batch: int, tokens: int):
    """A memory of all layers that drops nothing of one frame, and its counts."""
    layers = config.num_cross_layers
    plan = retention_plan(MemoryConfig(policy="full", max_frames=1), tokens, layers)
    retention = Retention(
        recent=jnp.asarray(plan.recent),
        older=jnp.asarray(plan.older),
        seed=jnp.zeros((layers, batch), jnp.uint32),
        max_older=int(plan.older.max()),
        ranking=plan.ranking,
    )
    head_dim = config.width // config.num_heads
    layer = init_memory(batch, config.num_heads, head_dim, plan.capacity, tokens, jnp.float32)
    memory = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (layers, *leaf.shape)), layer)
    return memory, retention


def run(config: QFormerConfig, params, ids, mask, features):
    """Query rows, scores [L, B, P], and the rows that go into layer 0, [B, N + R, E]."""
    batch, tokens, width = features.shape
    memory, retention = empty_memory(config, batch, tokens)
    module = QFormer(config, width)

    @jax.jit
    def apply(params, ids, mask, features):
        key, value = module.apply({"params": params}, features[:, None], method="project")
        one = jnp.ones((1, batch), bool)
        frames = Frames(key, value, index=jnp.zeros((1, batch), jnp.int32), valid=one)
        (queries, after), seen = module.apply(
            {"params": params}, ids, mask, frames, memory, retention, capture_intermediates=True
        )
        rows = seen["intermediates"]["norm"]["__call__"][0]
        return queries[:, 0], after.in_time_order()["score"][..., :tokens], rows

    return apply(params, ids, mask, features)


def run_layer_by_layer(config: QFormerConfig, params, rows, mask, features):
    """All rows [B, N + R, E] after every layer; probabilities [B, H, N, P] of every reading one."""
    batch, tokens, width = features.shape
    memory, retention = empty_memory(config, batch, tokens)
    frames = (jnp.zeros((1, batch), jnp.int32), jnp.ones((1, batch), bool))
    key, value = QFormer(config, width).apply(
        {"params": params}, features[:, None], method="project"
    )
    group = Group(config, "query", deterministic=True)

    @jax.jit
    def apply(params, rows, inputs):
        (rows, after), seen = group.apply(
            {"params": params}, rows, mask, frames, inputs, capture_intermediates=True
        )
        seen = seen["intermediates"]
        query = seen["cross_attention"]["query"]["__call__"][0][:, 0].transpose(0, 2, 1, 3)
        probs = attention_probs(query, after, live_slots(after, after.length))

        def layer(i: int) -> jax.Array:
            branches = seen[f"query_ffn_{i}"], seen[f"text_ffn_{i}"]
            return jnp.concatenate([branch["__call__"][0] for branch in branches], axis=2)

        layers = [layer(i) for i in range(config.cross_attention_every)]
        return rows, layers, probs[..., :tokens]

    layers, probs = [], []
    rows = rows[:, None]
    for number in range(config.num_cross_layers):
        weights, *inputs = jax.tree.map(
            lambda leaf, number=number: leaf[number],
            (params["groups"], key, value, memory, retention),
        )
        rows, outputs, read = apply(weights, rows, inputs)
        layers += [output[:, 0] for output in outputs]
        probs.append(read)
    return layers, probs
