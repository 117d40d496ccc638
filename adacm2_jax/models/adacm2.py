"""AdaCM²: the only file that knows all three networks.

The walk, for B videos of any length::

    frames uint8[B, F, H, W, 3]      a chunk of F frames
      │ encode_frames                ViT                                      [B, F, P, V]
      │ read                         LayerNorm + temporal embedding, keys and values,
      │                              Q-Former and memory, frame by frame      StreamState
      ▼ … the next chunk, the same compiled step …
    state.queries [B, N, E]          what the last frame left of the queries
      │ visual_tokens                language projection                      [B, N, W]
      ▼ + prompt                     LLM                                      answer

Everything that persists is in :class:`StreamState`, an argument and a result. A question is a batch
row beside its video: many questions about one video share ``encode_frames``.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from adacm2_jax.config import AdaCM2Config
from adacm2_jax.errors import UserError
from adacm2_jax.memory.banks import BankMemory
from adacm2_jax.memory.slots import VideoMemory
from adacm2_jax.models.bank_qformer import BankQFormer
from adacm2_jax.models.layers import ZEROS, Dense, LayerNorm, param, wide
from adacm2_jax.models.llama import KVCache, Llama, init_cache
from adacm2_jax.models.qformer import Chunk, QFormer
from adacm2_jax.models.vit import VisionTransformer, normalise
from adacm2_jax.sharding import over_model


class StreamState(struct.PyTreeNode):
    """What is known of B videos (each with its question) after the frames seen so far."""

    #: leaves [L, B, …]: the memory of every cross-attention layer; under policy merge the banks.
    memory: VideoMemory | BankMemory
    #: [B, N, E]: the query rows after the last valid frame (zeros before the first).
    queries: jax.Array
    #: int32[B]: valid frames seen.
    frames_seen: jax.Array
    #: int32[B]: frames that the video will have, for the temporal embedding; 0 if nobody knows.
    total_frames: jax.Array
    #: uint32[B]: the videos' seeds for the random policy.
    seed: jax.Array


class Question(struct.PyTreeNode):
    """A batch of questions as both language networks read them."""

    #: int32[B, R]: in the Q-Former's vocabulary, padded on the right.
    qformer_ids: jax.Array
    #: bool[B, R].
    qformer_mask: jax.Array
    #: int32[B, S]: in the LLM's vocabulary; padded on the left to generate, on the right to train.
    llm_ids: jax.Array
    #: bool[B, S].
    llm_mask: jax.Array


def qformer_type(config: AdaCM2Config) -> type[QFormer] | type[BankQFormer]:
    """The Q-Former that a policy needs, with its memory as ``memory_type``.

    Here alone the two kinds are told apart. Both have the same parameters, so that a checkpoint
    works with every policy, and both offer ``read``; their memories offer ``check``, ``empty``,
    ``specs``, ``tokens_kept``, ``sources`` and ``in_time_order``.
    """
    return BankQFormer if config.memory.policy == "merge" else QFormer


def check_memory(config: AdaCM2Config) -> None:
    """Raises ``UserError`` if the memory has no bound, does not fit the model, or is never read."""
    if not config.qformer.num_queries:
        raise UserError("qformer.num_queries = 0 must be at least 1")
    qformer_type(config).memory_type.check(config)


def init_state(
    config: AdaCM2Config, total_frames: jax.Array, seed: jax.Array | None = None
) -> StreamState:
    """The state before the first frame.

    Args:
      config: the model.
      total_frames: int32[B], frames that each video will have, or 0 for an open-ended stream.
      seed: uint32[B] for the random policy; zeros by default.

    Returns:
      Arrays of its own, which may be donated: none is the caller's.
    """
    q, dtype = config.qformer, jnp.dtype(config.memory_dtype)
    batch = total_frames.shape[0]
    seed = jnp.zeros((batch,), jnp.uint32) if seed is None else seed
    return StreamState(
        memory=qformer_type(config).memory_type.empty(config, batch),
        queries=jnp.zeros((batch, q.num_queries, q.width), dtype),
        frames_seen=jnp.zeros((batch,), jnp.int32),
        total_frames=jnp.array(total_frames, jnp.int32),
        seed=jnp.array(seed, jnp.uint32),
    )


def state_specs(state: StreamState) -> Any:
    """A ``PartitionSpec`` for every leaf: a state is divided over ``data``, by its videos."""
    rows: Any = PartitionSpec("data")
    return StreamState(state.memory.specs(), rows, rows, rows, rows)


def repeat_rows(state: StreamState, times: int) -> StreamState:
    """The state of B videos as that of B · ``times`` rows; those of one video stand together."""
    if times == 1:
        return state
    return jax.tree.map(
        lambda leaf, spec: jnp.repeat(leaf, times, axis=spec.index("data")),
        state,
        state_specs(state),
    )


def temporal_position(index: jax.Array, total: jax.Array, rows: int) -> jax.Array:
    """Where frame ``index`` of ``total`` stands in a table of ``rows``, float32, same shape.

    Row by row while the table is long enough; spread evenly over it when the video is longer;
    row by row and then the last row for ever when the length is unknown (``total`` 0).
    """
    spread = index * (rows - 1) / jnp.maximum(total - 1, 1)
    return jnp.minimum(jnp.where(total > rows, spread, index), rows - 1).astype(jnp.float32)


def widen(kept: jax.Array, dtype: str) -> jax.Array:
    """Features as they are kept (``encode_frames``) in ``dtype``; the rounding is the host's."""
    if kept.dtype == jnp.int8:
        scales = jax.lax.bitcast_convert_type(kept[..., -4:], jnp.float32)
        kept = kept[..., :-4].astype(jnp.float32) * scales[..., None]
    if kept.dtype == jnp.float32 and dtype == "bfloat16":
        kept = jax.lax.reduce_precision(kept, 8, 7)  # or XLA may leave the rounding out
    return kept.astype(dtype)


class AdaCM2(nn.Module):
    """The model. Its methods are called through :func:`call`."""

    config: AdaCM2Config

    def setup(self):
        c = self.config
        self.vision = VisionTransformer(c.vision, c.remat, c.fused_vision, c.fused_epilogues)
        self.ln_vision = LayerNorm(c.ln_vision_eps, "vision")
        self.temporal_embed = param(
            self,
            "temporal_embed",
            ZEROS,
            (c.temporal_positions, c.vision.width),
            ("frame", "vision"),
        )
        self.qformer: Any = qformer_type(c)(
            c.qformer, c.vision.width, c.memory, c.remat, c.fused_memory
        )
        self.language_projection = Dense((c.qformer.width, c.llm.width), ("embed", "llm_embed"))
        self.llm = Llama(c.llm, c.remat)

    def encode_frames(self, frames: jax.Array) -> jax.Array:
        """The ViT on a chunk: uint8[B, F, height, width, 3] → [B, F, P, V] in ``feature_dtype``.

        What has been through the ViT before (a cache of features) is handed on: [B, F, P, V] of
        floats, or int8[B, F, P, V + 4], whose last four bytes are the token's scale, a float32.
        """
        if frames.ndim == 4:
            return widen(frames, self.config.feature_dtype)

        def encode(images: jax.Array) -> jax.Array:
            pixels = normalise(images)
            return self.vision(pixels.astype(self.config.dtype)).astype(self.config.feature_dtype)

        images = frames.reshape((-1,) + frames.shape[2:])
        features = over_model(encode)(images)
        return features.reshape(frames.shape[:2] + features.shape[1:])

    def read(
        self,
        features: jax.Array,
        valid: jax.Array,
        question: Question,
        state: StreamState,
        deterministic: bool = True,
    ) -> StreamState:
        """Reads a chunk of frames: the step that is compiled once and serves every length.

        Args:
          features: [B, F, P, V], from :meth:`encode_frames`. With k questions a video, B / k rows:
            row b of question and state belongs to video b // k.
          valid: bool[B / k, F], or [B, F] with the same for all rows of a video; a padded frame
            changes nothing at all.
          question: one a row.
          state: after the frames before.
          deterministic: false switches dropout on (needs the rng ``dropout``).
        """
        c, batch = self.config, state.frames_seen.shape[0]
        share = batch // features.shape[0]  # k, questions a video
        valid = jnp.repeat(valid, batch // valid.shape[0], axis=0)
        index = state.frames_seen[:, None] + jnp.cumsum(valid, axis=1) - 1
        index = jnp.maximum(index, 0).astype(jnp.int32)
        position = temporal_position(index, state.total_frames[:, None], c.temporal_positions)
        tokens = self._tokens(features, position[::share][:, :, None])
        last = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), -1), axis=1)
        seen, last = last >= 0, jnp.maximum(last, 0)
        text = question.qformer_ids, question.qformer_mask
        chunk = Chunk(tokens, index, valid, last)
        queries, memory = self.qformer.read(*text, chunk, state.memory, state.seed, deterministic)
        return state.replace(
            memory=memory,
            queries=jnp.where(seen[:, None, None], queries, state.queries),
            frames_seen=state.frames_seen + valid.sum(1, dtype=jnp.int32),
        )

    def renew(self, state: StreamState, slots: jax.Array) -> StreamState:
        """The same state, its keys and values computed from the ViT's features once more.

        Their values do not change; they are functions of the parameters again, with a gradient.

        Args:
          state: its memory is left as it is where it is computed from no features (``sources``).
          slots: [L, B, S, V], the feature of the token in each slot of ``memory.sources``.
        """
        frame, _ = state.memory.sources(self.config)
        if not len(frame):
            return state
        rows = self.config.temporal_positions
        position = temporal_position(frame, state.total_frames[:, None], rows)
        key, value = self.qformer.project_slots(self._tokens(slots, position))
        return state.replace(memory=state.memory.replace(key=key, value=value))

    def visual_tokens(self, queries: jax.Array) -> jax.Array:
        """The N tokens that stand for the video in the prompt, [B, N, W] in the LLM's dtype.

        Args:
          queries: [B, N, E], of a state after the last frame.
        """
        return self.language_projection(queries).astype(self.config.dtype)

    def answer_log_probs(
        self, queries: jax.Array, question: Question, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """How probable every token of an answer is after the video and the tokens before it.

        The language model's head, a product with the whole vocabulary, is applied where the answer
        stands and nowhere else.

        Args:
          queries: [B, N, E], of a state after the last frame.
          question: its ``llm_ids`` hold prompt and answer, then padding (LAVIS's order).
          targets: bool[B, S], true on the tokens of the answer, which follow one another and are A
            = ``max_answer_len`` at most.

        Returns:
          float32[B, A], the log-probability of each token; bool[B, A], whether it is the most
          probable one; and bool[B, A], false behind the answer's end.
        """
        visual = self.visual_tokens(queries)
        tokens = self.llm.embed(question.llm_ids, visual.dtype)
        mask = jnp.concatenate([jnp.ones(visual.shape[:2], bool), question.llm_mask], axis=1)
        positions = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
        hidden, _ = self.llm(jnp.concatenate([visual, tokens], axis=1), mask, positions)
        place = jnp.argmax(targets, axis=1)[:, None] + jnp.arange(self.config.max_answer_len)
        known = place < targets.shape[1]
        place = jnp.minimum(place, targets.shape[1] - 1)
        known &= jnp.take_along_axis(targets, place, axis=1)
        ids = jnp.take_along_axis(question.llm_ids, place, axis=1)
        # What a token is predicted from stands before it.
        before = place + visual.shape[1] - 1
        logits = self.llm.logits(jnp.take_along_axis(hidden, before[..., None], axis=1))
        log_probs = jax.nn.log_softmax(logits)
        log_probs = jnp.take_along_axis(log_probs, ids[..., None], axis=-1)[..., 0]
        return log_probs, logits.argmax(-1) == ids, known

    def answer_loss(
        self,
        queries: jax.Array,
        question: Question,
        targets: jax.Array,
        count: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy of the answer, teacher-forced.

        Args:
          queries, question, targets: as in :meth:`answer_log_probs`.
          count: what sums over targets are divided by; by default the number of targets.

        Returns:
          float32 scalars: the mean loss a target token, and the share predicted exactly.
        """
        log_probs, best, known = self.answer_log_probs(queries, question, targets)
        count = jnp.maximum(targets.sum(), 1) if count is None else count
        return jnp.where(known, -log_probs, 0).sum() / count, (best & known).sum() / count

    def log_likelihood(
        self, queries: jax.Array, question: Question, targets: jax.Array
    ) -> jax.Array:
        """float32[B]: the summed log-probability of each answer; see :meth:`answer_log_probs`."""
        log_probs, _, known = self.answer_log_probs(queries, question, targets)
        return jnp.where(known, log_probs, 0).sum(axis=1)

    def prefill(
        self, queries: jax.Array, question: Question, cache_length: int
    ) -> tuple[jax.Array, KVCache]:
        """Visual tokens and the (left-padded) prompt through the LLM.

        Args:
          queries: [B, N, E], of a state after the last frame.
          question: its ``llm_ids`` hold the prompt.
          cache_length: places of the cache.

        Returns:
          The logits of the first answer token, float32[B, vocabulary], and the KV cache with room
          for ``cache_length`` places in all.
        """
        visual = self.visual_tokens(queries)
        tokens = self.llm.embed(question.llm_ids, visual.dtype)
        mask = jnp.concatenate([jnp.ones(visual.shape[:2], bool), question.llm_mask], axis=1)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        cache = init_cache(self.config.llm, mask.shape[0], cache_length, visual.dtype)
        embeddings = jnp.concatenate([visual, tokens], axis=1)
        hidden, cache = self.llm(embeddings, mask, positions, cache)
        return self.llm.logits(hidden[:, -1]), cache

    def decode(self, ids: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """One more token: int32[B] → float32[B, vocabulary] logits of the next, and the cache."""
        positions = cache.tokens[:, None]
        embeddings = self.llm.embed(ids[:, None], cache.key[0].dtype)
        mask = jnp.ones((ids.shape[0], 1), bool)
        hidden, cache = self.llm(embeddings, mask, positions, cache)
        return self.llm.logits(hidden[:, 0]), cache

    def __call__(self, frames: jax.Array, question: Question) -> jax.Array:
        """Touches every parameter, for ``init``: a clip to the first token's logits."""
        valid = jnp.ones(frames.shape[:2], bool)
        state = init_state(self.config, jnp.full((frames.shape[0],), frames.shape[1], jnp.int32))
        state = self.read(self.encode_frames(frames), valid, question, state)
        length = self.config.qformer.num_queries + question.llm_ids.shape[1]
        return self.prefill(state.queries, question, length)[0]

    def _tokens(self, features: jax.Array, position: jax.Array) -> jax.Array:
        """What the Q-Former reads: features [… , V] at float32[…] places of the temporal table."""
        tokens = self.ln_vision(wide(features)) + self._temporal(position)
        return tokens.astype(self.config.memory_dtype)

    def _temporal(self, position: jax.Array) -> jax.Array:
        """Rows of the temporal table at fractional positions, float32[…] → [… , V]."""
        low = jnp.floor(position).astype(jnp.int32)
        high = jnp.minimum(low + 1, self.config.temporal_positions - 1)
        share = (position - low)[..., None]
        return self.temporal_embed[low] * (1 - share) + self.temporal_embed[high] * share


def call(model: AdaCM2, params: dict, method: str, *args: Any, **options: Any) -> Any:
    """``model.method(*args)`` with these parameters: a pure function."""
    return model.apply({"params": params}, *args, method=method, **options)


def init_params(config: AdaCM2Config, key: jax.Array):
    """Fresh float32 parameters as boxed leaves that name their logical axes (``nn.unbox`` removes
    the boxes); call it under ``jax.eval_shape`` for shapes alone."""
    size = config.vision.image_size
    ids, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    frames = jnp.zeros((1, 1, size, size, 3), jnp.uint8)
    return AdaCM2(config).init(key, frames, Question(ids, mask, ids, mask))["params"]
