"""What a session of a stream knows, as a value, and the compiled steps from value to value.

A session keeps two kinds of memory of one video. Each question that is **known** has a memory of
its own, chosen by its attention, as in every other reading. Beside them there is an **open** one
for the questions that nobody has asked yet, chosen by how new a token is. The newest frame is held
back (see ``models/before_last.py``): a question, known or late, reads its memory and that frame,
and what it leaves is thrown away after the answer. So asking changes nothing, and the stream goes
on.

All is a :class:`SessionState`, whose size does not depend on the frames seen. Sessions at different
places of different videos are rows of one state (:func:`stack`), and share a compiled step.

Axes: V sessions, F frames of a chunk, P tokens a frame; k known questions a session.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from adacm2_jax.models.adacm2 import (
    AdaCM2,
    Question,
    StreamState,
    call,
    init_state,
    repeat_rows,
    state_specs,
)
from adacm2_jax.models.before_last import advance
from adacm2_jax.models.params import replicated_parts
from adacm2_jax.sharding import ROWS, on_every_shard


class SessionModels(NamedTuple):
    """The same networks with two memories."""

    #: Of the questions that are known.
    known: AdaCM2
    #: Of those that are not.
    open: AdaCM2


class SessionState(struct.PyTreeNode):
    """All that V sessions know."""

    #: Of V · k rows, those of a session together: after all frames but the newest; None if k = 0.
    known: StreamState | None
    #: Of V rows.
    open: StreamState
    #: [V, P, width]: what the ViT makes of the newest frame.
    newest: jax.Array
    #: bool[V]: false where there has been no frame yet.
    held: jax.Array

    @property
    def seen(self) -> jax.Array:
        """int32[V]: frames, the newest included."""
        return self.open.frames_seen + self.held


def begin(models: SessionModels, sessions: int, known: int) -> SessionState:
    """Before the first frame.

    Args:
      models: of the sessions.
      sessions: V.
      known: k, questions of each that are known.
    """
    config = models.open.config
    shape = (sessions, config.vision.tokens_per_frame, config.vision.width)
    rows = jnp.zeros((sessions * known,), jnp.int32)  # frames to come: nobody knows
    return SessionState(
        known=init_state(models.known.config, rows) if known else None,
        open=init_state(config, jnp.zeros((sessions,), jnp.int32)),
        newest=jnp.zeros(shape, jnp.dtype(config.feature_dtype)),
        held=jnp.zeros((sessions,), bool),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def push(
    models: SessionModels,
    params: dict,
    state: SessionState,
    features: jax.Array,
    valid: jax.Array,
    known: Question | None,
    generic: Question,
) -> SessionState:
    """A chunk of frames of every session; the state is donated.

    Args:
      models, params: of the sessions.
      state: before the chunk.
      features: [V, F, P, width], of ``AdaCM2.encode_frames``.
      valid: bool[V, F]; a padded frame changes nothing at all.
      known: of V · k rows, or None.
      generic: of V rows: what the open memory is read with.
    """
    specs = session_specs(state)

    def run(params, state, features, valid, known, generic):
        chunk, earlier, newest, held = advance(state.newest, state.held, features, valid)
        after = call(models.open, params, "read", chunk, earlier, generic, state.open)
        mine = state.known
        if mine is not None:
            mine = call(models.known, params, "read", chunk, earlier, known, mine)
        return SessionState(mine, after, newest, held)

    run = on_every_shard(
        run, len(features), (PartitionSpec(), specs, ROWS, ROWS, ROWS, ROWS), specs
    )
    return run(replicated_parts(params), state, features, valid, known, generic)


@functools.partial(jax.jit, static_argnums=0)
def push_rows(
    models: SessionModels,
    params: dict,
    states: tuple[SessionState, ...],
    features: tuple[jax.Array, ...],
    valid: jax.Array,
    known: tuple[Question, ...] | None,
    generic: Question,
) -> list[SessionState]:
    """:func:`push` for sessions that are states of their own, as the rows of one pass.

    Args:
      models, params: of the sessions.
      states: of V sessions, each of one row; they are not donated.
      features: of each [1, F, P, width].
      valid: bool[V, F].
      known: of each, k rows, or None.
      generic: of one row.

    Returns:
      The states after the chunk.
    """
    count = len(states)
    join = functools.partial(jax.tree.map, lambda *leaves: jnp.concatenate(leaves))
    after = push(
        models,
        params,
        stack(states),
        jnp.concatenate(features),
        valid,
        None if known is None else join(*known),
        jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf), count, axis=0), generic),
    )
    return split(after)


@functools.partial(jax.jit, static_argnums=0)
def ask_known(
    models: SessionModels, params: dict, state: SessionState, known: Question
) -> jax.Array:
    """What the newest frame leaves of the queries of all known questions, [V · k, N, E].

    Zeros where there has been no frame. The state is not touched.
    """
    return _ask(models.known, params, state, state.known, known)


@functools.partial(jax.jit, static_argnums=0)
def ask_late(
    models: SessionModels, params: dict, state: SessionState, question: Question
) -> jax.Array:
    """The same of V · j other questions, those about a session together, by its open memory."""
    return _ask(models.open, params, state, state.open, question)


def _ask(
    model: AdaCM2, params: dict, session: SessionState, state: Any, question: Question
) -> jax.Array:
    specs = state_specs(state)

    def run(params, state, newest, held, question):
        rows = repeat_rows(state, len(question.qformer_ids) // len(state.frames_seen))
        return call(model, params, "read", newest[:, None], held[:, None], question, rows).queries

    run = on_every_shard(run, len(session.held), (PartitionSpec(), specs, ROWS, ROWS, ROWS), ROWS)
    return run(replicated_parts(params), state, session.newest, session.held, question)


def session_specs(state: SessionState) -> Any:
    """A ``PartitionSpec`` for every leaf: a state is divided over ``data``, by its sessions."""
    rows: Any = ROWS
    known = None if state.known is None else state_specs(state.known)
    return SessionState(known, state_specs(state.open), rows, rows)


def stack(states: Sequence[SessionState]) -> SessionState:
    """Sessions with as many known questions each, as the rows of one state."""
    return jax.tree.map(
        lambda spec, *leaves: jnp.concatenate(leaves, axis=spec.index("data")),
        session_specs(states[0]),
        *states,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def split(state: SessionState) -> list[SessionState]:
    """The inverse of :func:`stack`: every session by itself."""
    count = len(state.held)

    def part(number: int) -> SessionState:
        def take(spec, leaf):
            axis = spec.index("data")
            size = leaf.shape[axis] // count
            return jax.lax.slice_in_dim(leaf, number * size, (number + 1) * size, axis=axis)

        return jax.tree.map(
            take,
            session_specs(state),
            state,
            is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
        )

    return [part(number) for number in range(count)]
