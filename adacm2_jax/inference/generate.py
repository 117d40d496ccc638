"""Answers: prefill once, then greedy, beam or sampled decoding with static shapes.

:func:`generate` joins the model to :func:`search`, which knows of it no more than the logits of the
first token, a KV cache and a ``decode`` function; a bare :class:`~adacm2_jax.models.llama.Llama` is
searched in the same way. Both are pure; ``jax.jit(generate, static_argnums=(0, 4))`` compiles one
program for each shape and each (hashable) :class:`GenerationConfig`.

What is chosen is what Hugging Face transformers 5.23 chooses, token for token, when its
``generate`` is called with ``inputs_embeds`` (as LAVIS does): so the repetition penalty looks at
the generated tokens alone, never at the prompt.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from adacm2_jax.errors import UserError
from adacm2_jax.models.adacm2 import AdaCM2, Question, call
from adacm2_jax.models.llama import KVCache

#: (int32[R] newest token of each row, cache) → (float32[R, vocabulary] logits of the next, cache).
Decode = Callable[[jax.Array, KVCache], tuple[jax.Array, KVCache]]


@dataclass(frozen=True)
class GenerationConfig:
    """How to decode. Hashable: a static argument under ``jax.jit``.

    Attributes:
      max_new_tokens: length of the longest answer, its end token included.
      min_new_tokens: tokens that come before an end token is allowed.
      num_beams: 1 is greedy (or sampling), more is beam search.
      length_penalty: a sequence's score is its summed log-probability / length**length_penalty, the
        end token counted; above 0 favours long answers, below 0 short ones.
      repetition_penalty: a score below 0 is multiplied by it, one above 0 divided by it, for tokens
        that the answer already holds; 1 does nothing. As in transformers it acts on logits in
        greedy decoding and sampling, on log-probabilities (not normalised again) in beam search.
      num_return: the best sequences to return, at most ``num_beams``.
      temperature: 0 decodes greedily or by beams, above 0 samples.
      top_p: samples from the fewest most probable tokens that together have this probability.
      eos_ids: tokens that end an answer; may be empty.
      pad_id: fills ``Generated.ids`` after the end.

    Raises:
      UserError: for a value out of range, or two that contradict each other.
    """

    max_new_tokens: int = 16
    min_new_tokens: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    num_return: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    eos_ids: tuple[int, ...] = (2,)
    pad_id: int = 0

    def __post_init__(self):
        for name, least in (
            ("max_new_tokens", 1),
            ("min_new_tokens", 0),
            ("num_beams", 1),
            ("num_return", 1),
            ("pad_id", 0),
        ):
            value = getattr(self, name)
            if not _is_whole(value) or value < least:
                raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}")
        for name in ("length_penalty", "repetition_penalty", "temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise UserError(f"{name} must be a number, not {value!r}")
            if not math.isfinite(value):
                raise UserError(f"{name} must be finite, not {value}")
        if isinstance(self.eos_ids, list):
            object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        if not isinstance(self.eos_ids, tuple) or not all(
            _is_whole(token) and token >= 0 for token in self.eos_ids
        ):
            raise UserError(
                f"eos_ids must be a tuple of token ids such as (2,), not {self.eos_ids!r}"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens = {self.min_new_tokens} exceeds max_new_tokens = "
                f"{self.max_new_tokens}; lower it"
            )
        if self.num_return > self.num_beams:
            raise UserError(
                f"num_return = {self.num_return} exceeds num_beams = {self.num_beams}; "
                "raise num_beams"
            )
        if self.repetition_penalty <= 0:
            raise UserError(
                f"repetition_penalty must be above 0 (1 is none), not {self.repetition_penalty}"
            )
        if self.temperature < 0:
            raise UserError(f"temperature must be 0 (greedy) or above, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.temperature and self.num_beams > 1:
            raise UserError(
                f"temperature = {self.temperature} samples, which num_beams = {self.num_beams} "
                "does not; set one of them to its default"
            )
        if self.top_p < 1 and not self.temperature:
            raise UserError(
                f"top_p = {self.top_p} acts on sampling alone; set temperature above 0 or "
                "top_p to 1"
            )


class Generated(struct.PyTreeNode):
    """K token sequences for each of B rows, T = ``max_new_tokens``; in a result the best first.

    A row that has fewer than K sequences (a vocabulary of a handful of tokens) is filled up with
    empty ones: length 0, score −inf.
    """

    #: int32[B, K, T]: the tokens, the end token included, then ``pad_id``.
    ids: jax.Array
    #: int32[B, K]: tokens before the padding.
    lengths: jax.Array
    #: float32[B, K]: summed log-probability of the tokens, after every penalty, temperature and
    #: top-p, / lengths**length_penalty.
    scores: jax.Array


class DecodeState(struct.PyTreeNode):
    """What the decoding loop carries: B rows of K = ``num_beams`` beams."""

    #: int32: tokens chosen so far.
    step: jax.Array
    #: leaves [B·K, …]: what the model has read of every beam: all but its newest token.
    cache: KVCache
    #: [B, K] open sequences, best first; scores not yet divided by length, −inf for a dead beam.
    running: Generated
    #: [B, K] the best ended sequences, best first; scores divided, −inf for an empty place.
    finished: Generated
    #: bool[B]: nothing that is still open can change ``finished``.
    done: jax.Array


def generate(
    model: AdaCM2,
    params: Any,
    queries: jax.Array,
    question: Question,
    config: GenerationConfig,
    rng: jax.Array | None = None,
) -> Generated:
    """Answers B questions, each about the video beside it.

    Args:
      model: the model.
      params: its parameters, unboxed.
      queries: [B, N, E], of a state after the last frame.
      question: its ``llm_ids`` int32[B, S] hold the prompt, padded on the **left**.
      config: how to decode.
      rng: needed to sample, as made by ``jax.random.key``: one key (row i uses ``fold_in(rng,
        i)``), or B keys; a row's answer depends on its own key and not on the rows beside it.

    Returns:
      ids int32[B, num_return, max_new_tokens], lengths int32[B, num_return] and scores
      float32[B, num_return].

    Raises:
      UserError: if prompt and answer exceed the LLM's positions, if the end tokens do not fit the
        vocabulary, or if ``rng`` does not fit ``config``.
    """
    prompt = model.config.qformer.num_queries + question.llm_ids.shape[1]
    limit = model.config.llm.max_positions
    if prompt + config.max_new_tokens > limit:
        raise UserError(
            f"max_new_tokens = {config.max_new_tokens} after {prompt} places of prompt exceed "
            f"llm.max_positions = {limit}; lower max_new_tokens or shorten the prompt"
        )

    # The newest token is never fed, so the cache needs one place less than the answer has.
    length = prompt + config.max_new_tokens - 1
    logits, cache = call(model, params, "prefill", queries, question, length)
    return search(logits, cache, partial(call, model, params, "decode"), config, rng)


def search(
    logits: jax.Array,
    cache: KVCache,
    decode: Decode,
    config: GenerationConfig,
    rng: jax.Array | None = None,
) -> Generated:
    """Decodes from what a prefill left; see :func:`generate`.

    Args:
      logits: float32[B, vocabulary] of the first token.
      cache: of B rows, with room for ``max_new_tokens − 1`` more.
      decode: called with B·num_beams rows.
      config: how to decode.
      rng: one key or B keys, to sample.

    Raises:
      UserError: if the end tokens do not fit the vocabulary, or ``rng`` does not fit ``config``.
    """
    batch, vocabulary = logits.shape
    _check_vocabulary(config, vocabulary)
    beams, longest = config.num_beams, config.max_new_tokens
    if beams > 1:
        choose = partial(_choose_beams, config=config)
        cache = cache.branched(beams, longest - 1)
        logits = jnp.repeat(logits, beams, axis=0)
    else:
        keys = _row_keys(config, batch, rng)
        choose = partial(_choose_token, config=config, keys=keys)

    empty = Generated(
        ids=jnp.full((batch, beams, longest), config.pad_id, jnp.int32),
        lengths=jnp.zeros((batch, beams), jnp.int32),
        scores=jnp.full((batch, beams), -jnp.inf),
    )
    state = DecodeState(
        step=jnp.zeros((), jnp.int32),
        cache=cache,
        # All beams start alike: were they all alive, they would stay copies of one another.
        running=replace(empty, scores=empty.scores.at[:, 0].set(0)),
        finished=empty,
        done=jnp.zeros((batch,), bool),
    )

    def advance(state: DecodeState) -> DecodeState:
        newest = jax.lax.dynamic_index_in_dim(state.running.ids, state.step - 1, 2, keepdims=False)
        logits, cache = decode(newest.reshape(-1), state.cache)
        return choose(replace(state, cache=cache), logits)

    state = jax.lax.while_loop(lambda state: ~state.done.all(), advance, choose(state, logits))
    return jax.tree.map(lambda leaf: leaf[:, : config.num_return], state.finished)


def _choose_token(
    state: DecodeState, logits: jax.Array, config: GenerationConfig, keys: jax.Array | None
) -> DecodeState:
    """One greedy or sampled token for every row; logits float32[B, vocabulary]."""
    step, running = state.step, state.running
    scores = penalised(logits, running.ids[:, 0], step, config)
    if keys is None:
        token = jnp.argmax(scores, axis=-1)
    else:
        scores = nucleus(scores / config.temperature, config.top_p)
        now = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        token = jax.vmap(jax.random.categorical)(now, scores)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(scores), token[:, None], axis=1)
    token = jnp.where(state.done, config.pad_id, token).astype(jnp.int32)
    running = Generated(
        ids=running.ids.at[:, 0, step].set(token),
        lengths=jnp.full_like(running.lengths, step + 1),
        scores=running.scores + log_prob,
    )
    ends = _ends(token, step, config) & ~state.done
    ended = replace(running, scores=running.scores / _length_norm(step, config))
    return replace(
        state,
        step=step + 1,
        running=running,
        finished=jax.tree.map(
            lambda new, old: jnp.where(ends.reshape((-1,) + (1,) * (new.ndim - 1)), new, old),
            ended,
            state.finished,
        ),
        done=state.done | ends,
    )


def _choose_beams(state: DecodeState, logits: jax.Array, config: GenerationConfig) -> DecodeState:
    """One step of beam search; logits float32[B·K, vocabulary].

    An ended candidate counts only if it is among the best K of all; the open beams are the best K
    that have not ended. Of equal scores the lower beam, then the lower token id, wins.
    """
    step, running, finished = state.step, state.running, state.finished
    batch, beams, _ = running.ids.shape
    vocabulary = logits.shape[-1]
    scores = jax.nn.log_softmax(logits)
    scores = penalised(scores, running.ids.reshape(batch * beams, -1), step, config)
    scores = scores.reshape(batch, beams, vocabulary) + running.scores[..., None]

    # Of these at most eos_ids · K can have ended, so K open ones are always among them.
    wanted = max(2, 1 + len(config.eos_ids)) * beams
    score, place = jax.lax.top_k(scores.reshape(batch, -1), wanted)
    beam, token = place // vocabulary, (place % vocabulary).astype(jnp.int32)
    ids = jnp.take_along_axis(running.ids, beam[..., None], axis=1).at[:, :, step].set(token)
    candidates = Generated(ids=ids, lengths=jnp.full(beam.shape, step + 1, jnp.int32), scores=score)
    ends = _ends(token, step, config)

    norm = _length_norm(step, config)
    counts = ends & (jnp.arange(wanted) < beams) & ~state.done[:, None]
    ended = replace(candidates, scores=jnp.where(counts, score / norm, -jnp.inf))
    # The old ones come first, so that an empty place is never filled by a sequence that is open.
    merged = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), finished, ended)
    finished, _ = _best(merged, beams)

    open_ones = replace(candidates, scores=jnp.where(ends, -jnp.inf, score))
    running, chosen = _best(open_ones, beams)
    parent = jnp.take_along_axis(beam, chosen, axis=1)
    # transformers' rule for early_stopping=False: the best open beam, were it to end now, does not
    # beat the worst of K ended ones.
    improves = running.scores[:, 0] / norm > finished.scores[:, -1]
    return DecodeState(
        step=step + 1,
        cache=_take_beams(state.cache, parent),
        running=running,
        finished=finished,
        done=state.done | ~improves,
    )


def nucleus(logits: jax.Array, top_p: Any) -> jax.Array:
    """Sets all but the fewest most probable tokens that together reach ``top_p`` to −inf.

    A token stays if the more probable ones together have less than ``top_p``; of equally probable
    ones the lower id counts as the more probable. float32[B, vocabulary] → the same.
    """
    if not isinstance(top_p, jax.Array) and top_p == 1:
        return logits
    order = jnp.argsort(logits, axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1)), axis=-1)
    keep = jnp.pad(mass[:, :-1], ((0, 0), (1, 0))) < top_p
    keep = keep.at[:, 0].set(True)  # also where float32 makes 0 of top_p
    return jnp.where(
        jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1), logits, -jnp.inf
    )


def penalised(
    scores: jax.Array, ids: jax.Array, step: jax.Array, config: GenerationConfig
) -> jax.Array:
    """Repetition penalty, then the ban on early end tokens.

    Args:
      scores: float32[R, vocabulary] of the next token.
      ids: int32[R, T], whose first ``step`` are written.
      step: int32.
      config: how to decode.
    """
    rows, vocabulary = scores.shape
    if config.repetition_penalty != 1:
        written = jnp.arange(ids.shape[1]) < step
        used = jnp.where(written, ids, vocabulary)
        seen = jnp.zeros(scores.shape, bool)
        seen = seen.at[jnp.arange(rows)[:, None], used].set(True, mode="drop")
        penalty = config.repetition_penalty
        punished = jnp.where(scores < 0, scores * penalty, scores / penalty)
        scores = jnp.where(seen, punished, scores)
    if config.min_new_tokens and config.eos_ids:
        banned = _is_eos(jnp.arange(vocabulary), config) & (step < config.min_new_tokens)
        scores = jnp.where(banned, -jnp.inf, scores)
    return scores


def _is_eos(token: jax.Array, config: GenerationConfig) -> jax.Array:
    return jnp.isin(token, jnp.asarray(config.eos_ids, jnp.int32))


def _ends(token: jax.Array, step: jax.Array, config: GenerationConfig) -> jax.Array:
    """Whether a sequence ends with ``token``, its number ``step`` counted from 0."""
    return _is_eos(token, config) | (step + 1 == config.max_new_tokens)


def _length_norm(step: jax.Array, config: GenerationConfig) -> jax.Array:
    """(step + 1)**length_penalty, rounded once: computed in float64 on the host."""
    lengths = np.arange(1, config.max_new_tokens + 1, dtype=np.float64)
    return jnp.asarray(lengths**config.length_penalty, jnp.float32)[step]


def _best(sequences: Generated, count: int) -> tuple[Generated, jax.Array]:
    """The ``count`` best of each row, best first, and where they stood, int32[B, count]."""
    _, index = jax.lax.top_k(sequences.scores, count)
    return jax.tree.map(
        lambda leaf: leaf[jnp.arange(leaf.shape[0])[:, None], index], sequences
    ), index


def _take_beams(cache: KVCache, parent: jax.Array) -> KVCache:
    """The cache of the chosen beams: int32[B, K], each row's parents among its own rows.

    What they share stays where it is. Row by row, so that on a mesh no device needs another one's
    rows.
    """
    batch = len(parent)

    def take(leaf: jax.Array) -> jax.Array:
        rows = leaf.reshape((batch, len(leaf) // batch) + leaf.shape[1:])
        pick = jax.vmap(lambda row, chosen: jnp.take(row, chosen, axis=0))
        return pick(rows, parent).reshape((parent.size,) + leaf.shape[1:])

    arrays = cache.key, cache.value, cache.mask
    key, value, mask = jax.tree.map(take, arrays)
    return replace(cache, key=key, value=value, mask=mask)


def _row_keys(config: GenerationConfig, batch: int, rng: jax.Array | None) -> jax.Array | None:
    """One key a row to sample with, or None for greedy decoding."""
    if not config.temperature:
        return None
    if rng is None:
        raise UserError(
            f"temperature = {config.temperature} samples and needs rng; pass jax.random.key(seed)"
        )
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) or rng.shape not in ((), (batch,)):
        raise UserError(
            f"rng is {rng.dtype}{list(rng.shape)}; pass jax.random.key(seed), or {batch} such keys"
        )
    if rng.ndim:
        return rng
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(batch))


def _check_vocabulary(config: GenerationConfig, vocabulary: int) -> None:
    beyond = [token for token in config.eos_ids if token >= vocabulary]
    if beyond:
        raise UserError(
            f"eos_ids holds {beyond[0]}, but the LLM's vocabulary has {vocabulary} tokens; "
            "give the end tokens of its tokenizer"
        )
    if vocabulary < max(2, 1 + len(config.eos_ids)):
        raise UserError(
            f"eos_ids = {config.eos_ids} leave no other token of a vocabulary of {vocabulary}; "
            "give fewer"
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
