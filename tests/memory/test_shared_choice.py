"""One choice of tokens for all layers, against plain lists."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adacm2_jax.config import MemoryConfig
from adacm2_jax.memory.policies import retention_plan
from adacm2_jax.memory.slots import (
    Queries,
    Retention,
    init_memory,
    read_frame,
    retain_together,
)
from tests.memory.test_slots import BATCH, HEADS, SIZE, Clip, remembered


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_layers_that_choose_together_keep_the_tokens_with_the_highest_mean_score(decay):
    """Against lists: every layer attends by itself, the mean of their scores decides for all."""
    tokens, frames, layers = 5, 10, 3
    memory = MemoryConfig(policy="budget", capacity=7, recent_ratio="0.3", decay=decay)
    plan = retention_plan(dataclasses.replace(memory, shared_choice=True), tokens, layers)
    retention = Retention(
        recent=jnp.asarray(plan.recent),
        older=jnp.asarray(plan.older),
        seed=jnp.zeros((layers, BATCH), jnp.uint32),
        max_older=int(plan.older.max()),
        ranking=plan.ranking,
        decay=plan.decay,
        shared=plan.shared,
    )
    clips = [Clip.random([(t != 3, t > 1) for t in range(frames)], tokens, seed=7)]
    clips += [
        dataclasses.replace(Clip.random(clips[0].valid, tokens, seed=layer), seed=clips[0].seed)
        for layer in range(1, layers)
    ]
    empty = init_memory(BATCH, HEADS, SIZE, plan.capacity, tokens, jnp.float32)
    now = jax.tree.map(lambda leaf: jnp.stack([leaf] * layers), empty)
    kept: list[list] = [[] for _ in range(BATCH)]  # of each video: (frame, patch, score, keys)
    for t in range(frames):
        given = [clip.inputs(t) for clip in clips]
        frame = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[frame for frame, _ in given])
        rows = jnp.stack([queries.rows for _, queries in given])
        read = jax.vmap(lambda *args: read_frame(*args)[1])(now, retention, frame, Queries(rows))
        now = retain_together(read, retention, tokens, frame.valid[0])
        for b in np.flatnonzero(clips[0].valid[t]):
            kept[b] += [
                [int(clips[0].index[t, b]), patch, None, [c.key[t, b, :, patch] for c in clips]]
                for patch in range(tokens)
            ]
            score = np.zeros(len(kept[b]))
            for layer, clip in enumerate(clips):
                keys = np.stack([token[3][layer] for token in kept[b]], axis=1)
                logits = clip.query[t, b].astype(np.float64) @ keys.swapaxes(1, 2) / SIZE**0.5
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                score += (weights / weights.sum(-1, keepdims=True)).sum((0, 1)) / layers
            for token, value in zip(kept[b], score, strict=True):
                before = value if token[2] is None else token[2]
                token[2] = (1 - decay) * value + decay * before
            if len(kept[b]) > memory.capacity:
                newest = int(0.3 * memory.capacity)
                older = kept[b][:-newest]
                best = sorted(range(len(older)), key=lambda i: -older[i][2])
                chosen = sorted(best[: memory.capacity - newest])
                kept[b] = [older[i] for i in chosen] + kept[b][-newest:]
        for layer in range(layers):
            one = jax.tree.map(lambda leaf, layer=layer: np.asarray(leaf[layer]), now)
            for b in range(BATCH):
                assert remembered(one, b) == [tuple(token[:2]) for token in kept[b]]
