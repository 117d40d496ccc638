"""What a session will cost, before anything of it is made."""

import functools

import jax

from adacm2_jax.config import AdaCM2Config
from adacm2_jax.inference import session_steps
from adacm2_jax.inference.session_model import SessionModel
from adacm2_jax.inference.session_steps import SessionModels
from adacm2_jax.memory.policies import bound_of, plan_for

#: Of a likeness between two tokens, float32.
_LIKENESS = 4


@functools.lru_cache(256)
def state_bytes(models: SessionModels, questions: int) -> int:
    """Bytes of a session's state.

    Args:
      models: of the session.
      questions: that it knows.
    """
    shapes = jax.eval_shape(lambda: session_steps.begin(models, 1, questions))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def bound(models: SessionModels, questions: int) -> int:
    """Tokens that a session never exceeds; see ``Session.bound``."""
    known = bound_of(models.known.config) * questions if questions else 0
    return known + bound_of(models.open.config)


def pass_bytes(models: SessionModels, questions: int, rows: int) -> int:
    """Bytes of the largest array of a pass that is not part of any state.

    A memory that ranks by novelty compares each of its tokens, and those of the frame that comes,
    with each (``slots.novelty``): float32[rows, S, S]. Others make nothing that grows so.

    Args:
      models: of the sessions.
      questions: that each knows.
      rows: sessions of a pass.
    """
    pairs = rows * _pairs(models.open.config)
    if questions:
        pairs = max(pairs, rows * questions * _pairs(models.known.config))
    return pairs * _LIKENESS


def _pairs(config: AdaCM2Config) -> int:
    if not config.memory.novelty:
        return 0
    return (plan_for(config).capacity + config.vision.tokens_per_frame) ** 2


def most_tokens(model: SessionModel, rows: int, budget: int) -> int:
    """The largest open memory, a power of two, whose pass fits a budget; 0 if none does."""
    side = int((budget / (rows * _LIKENESS)) ** 0.5) - model.config.vision.tokens_per_frame
    return 1 << (side.bit_length() - 1) if side > 0 else 0


def rounded(tokens: int, default: int) -> int:
    """The open memory that a session gets who asks for ``tokens``: the next power of two, so that
    there are few programs; 0 and the default itself give the default."""
    if tokens in (0, default):
        return default
    return 1 << (tokens - 1).bit_length()
