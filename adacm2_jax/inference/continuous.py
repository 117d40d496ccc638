"""Several answers at a time, each begun when its question comes: continuous batching.

A table has a fixed number of rows. :func:`begin` reads a prompt and makes a row, :func:`put` places
it where another answer has ended, :func:`advance` adds a token to every row. Every row has a place
of its own in its answer, a temperature and a key, so that what is written in it depends on nothing
beside it: without a temperature it is what ``generate`` writes with one beam, token for token.

Axes: R rows, T = ``max_new_tokens``, N visual tokens, S tokens of a prompt.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from adacm2_jax.inference.generate import GenerationConfig, nucleus, penalised
from adacm2_jax.models.adacm2 import AdaCM2, Question, call
from adacm2_jax.models.llama import KVCache, init_cache

#: Up to this temperature the most probable token is taken: a quotient might not be finite.
_COLDEST = 1e-6


class Row(struct.PyTreeNode):
    """One answer while it is written; in a table every leaf has an axis R in front."""

    #: of one row, its own place in it.
    cache: KVCache
    #: int32[T]: the tokens so far, then padding.
    ids: jax.Array
    #: int32: how many.
    length: jax.Array
    #: float32: their summed log-probability.
    score: jax.Array
    #: float32: 0 takes the most probable token, and so does what is next to nothing.
    temperature: jax.Array
    #: float32: of sampling; see ``GenerationConfig``.
    top_p: jax.Array
    #: a key of jax.random, of sampling.
    key: jax.Array


class Written(struct.PyTreeNode):
    """The newest token of a row."""

    #: int32.
    token: jax.Array
    #: bool: it ends the answer, or there is no room for another.
    ended: jax.Array
    #: float32: what the answer's tokens are worth so far, as ``Generated.scores``.
    score: jax.Array


def empty(model: AdaCM2, rows: int, width: int, config: GenerationConfig) -> Row:
    """A table in which nothing is written yet.

    Args:
      model: that will write.
      rows: R.
      width: tokens of the longest prompt.
      config: how to decode; its ``temperature`` and ``top_p`` are each row's own.
    """
    longest = config.max_new_tokens
    places = model.config.qformer.num_queries + width + longest - 1

    def one(_: jax.Array) -> Row:
        return Row(
            cache=init_cache(model.config.llm, 1, places, jnp.dtype(model.config.dtype)),
            ids=jnp.full((longest,), config.pad_id, jnp.int32),
            length=jnp.zeros((), jnp.int32),
            score=jnp.zeros(()),
            temperature=jnp.zeros(()),
            top_p=jnp.ones(()),
            key=jax.random.key(0),
        )

    return jax.vmap(one)(jnp.arange(rows))


@functools.partial(jax.jit, static_argnums=(0, 7, 8))
def begin(
    model: AdaCM2,
    params: dict,
    queries: jax.Array,
    question: Question,
    temperature: jax.Array,
    top_p: jax.Array,
    key: jax.Array,
    width: int,
    config: GenerationConfig,
) -> tuple[Row, Written]:
    """Reads a prompt and writes the first token.

    Args:
      model, params: that write.
      queries: [1, N, E], of a state after the last frame.
      question: one row; its ``llm_ids`` are padded on the left to at most ``width``.
      temperature, top_p, key: of this answer; see :class:`Row`.
      width, config: as in :func:`empty`.
    """
    places = model.config.qformer.num_queries + width + config.max_new_tokens - 1
    logits, cache = call(model, params, "prefill", queries, question, places)
    row = Row(
        cache=cache,
        ids=jnp.full((config.max_new_tokens,), config.pad_id, jnp.int32),
        length=jnp.zeros((), jnp.int32),
        score=jnp.zeros(()),
        temperature=jnp.asarray(temperature, jnp.float32),
        top_p=jnp.asarray(top_p, jnp.float32),
        key=key,
    )
    return _write(row, logits[0], config)


@functools.partial(jax.jit, donate_argnums=0)
def put(table: Row, place: jax.Array, row: Row) -> Row:
    """The table with another row in one of its places; it is donated."""
    return jax.tree.map(lambda leaf, new: leaf.at[place].set(new), table, row)


@functools.partial(jax.jit, static_argnums=(0, 3), donate_argnums=2)
def advance(
    model: AdaCM2, params: dict, table: Row, config: GenerationConfig
) -> tuple[Row, Written]:
    """One more token in every row, also in those that have ended; the table is donated."""

    def one(row: Row) -> tuple[Row, Written]:
        newest = row.ids[row.length - 1]
        logits, cache = call(model, params, "decode", newest[None], row.cache)
        return _write(row.replace(cache=cache), logits[0], config)

    return jax.vmap(one)(table)


def _write(row: Row, logits: jax.Array, config: GenerationConfig) -> tuple[Row, Written]:
    """Chooses a token; logits float32[vocabulary]. A row that is full stays as it is."""
    step, room = row.length, config.max_new_tokens
    scores: Any = penalised(logits[None], row.ids[None], step, config)
    sampled = row.temperature > _COLDEST
    warm = scores / jnp.where(sampled, row.temperature, 1)
    warm = jnp.where(row.top_p < 1, nucleus(warm, row.top_p), warm)
    drawn = jax.random.categorical(jax.random.fold_in(row.key, step), warm[0])
    token = jnp.where(sampled, drawn, scores[0].argmax()).astype(jnp.int32)
    log_probs = jax.nn.log_softmax(jnp.where(sampled, warm, scores)[0])
    full = step >= room
    row = row.replace(
        ids=jnp.where(full, row.ids, row.ids.at[jnp.minimum(step, room - 1)].set(token)),
        length=jnp.minimum(step + 1, room),
        score=jnp.where(full, row.score, row.score + log_probs[token]),
    )
    ended = jnp.isin(token, jnp.asarray(config.eos_ids, jnp.int32)) | (row.length == room)
    norm = row.length.astype(jnp.float32) ** config.length_penalty
    return row, Written(token, ended, row.score / norm)
