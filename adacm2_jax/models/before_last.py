"""The newest frame held back: what can be asked again, and what a gradient can be taken of.

An answer depends on the memory before the newest frame and on that frame alone: the queries restart
at every frame. So whoever keeps both can ask at any time: the newest frame is read with a question,
which gives a new state that is thrown away after the answer, and the video goes on from the old one
(``inference/session_steps.py``, which moves on by :func:`advance`).

Training does the same once a clip, with a gradient (``training/two_phase.py``).

Axes: V videos, F frames of a chunk, P tokens a frame; k questions a video.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from adacm2_jax.config import AdaCM2Config
from adacm2_jax.models.adacm2 import AdaCM2, Question, StreamState, call, repeat_rows


class BeforeLast(struct.PyTreeNode):
    """All that is known of V videos, the newest frame of each held back."""

    #: after all valid frames but the newest; a row a video.
    state: StreamState
    #: [V, P, width]: what the ViT makes of the newest valid frame.
    newest: jax.Array
    #: bool[V]: false where there has been no valid frame yet.
    held: jax.Array


def before_first(config: AdaCM2Config, state: StreamState) -> BeforeLast:
    """Before the first frame.

    Args:
      config: the model.
      state: of ``init_state``.
    """
    videos, vision = len(state.frames_seen), config.vision
    shape = (videos, vision.tokens_per_frame, vision.width)
    newest = jnp.zeros(shape, jnp.dtype(config.feature_dtype))
    return BeforeLast(state, newest, jnp.zeros((videos,), bool))


def advance(
    newest: jax.Array, held: jax.Array, features: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A chunk comes in: what is to be read now, and what is held back instead.

    Args:
      newest: [V, P, width], the frame that was held back so far.
      held: bool[V]: false where there is none.
      features: [V, F, P, width].
      valid: bool[V, F].

    Returns:
      ``features`` and ``valid`` of the frames to be read, of the same shapes, then ``newest`` and
      ``held``.
    """
    count = valid.shape[1]
    features = jnp.concatenate([newest[:, None], features], axis=1)
    valid = jnp.concatenate([held[:, None], valid], axis=1)
    last = jnp.max(jnp.where(valid, jnp.arange(count + 1), -1), axis=1)
    earlier = valid & (jnp.arange(count + 1) != last[:, None])
    # One of F + 1 places is never read: the others in front, in order, and the step is that of F.
    order = jnp.argsort(~earlier, axis=1, stable=True)[:, :count]
    chunk = jnp.take_along_axis(features, order[..., None, None], axis=1)
    earlier = jnp.take_along_axis(earlier, order, axis=1)
    newest = jnp.take_along_axis(features, jnp.maximum(last, 0)[:, None, None, None], axis=1)
    return chunk, earlier, newest[:, 0], last >= 0


def read_last(
    model: AdaCM2, params: dict, before: BeforeLast, question: Question, **options: Any
) -> StreamState:
    """The step of the newest frame; ``before`` stays as it is and may be asked again.

    Args:
      model, params: of the video; ``params`` may be differentiated.
      before: the newest frame of V videos.
      question: of k · V rows, those of one video together.
      options: for ``AdaCM2.read``: ``deterministic``, and ``rngs`` for dropout.

    Returns:
      The state of k · V rows after all frames; a video that has none leaves it as it was.
    """
    times = len(question.qformer_ids) // len(before.held)
    chunk = before.newest[:, None], before.held[:, None]
    state = repeat_rows(before.state, times)
    return call(model, params, "read", *chunk, question, state, **options)
