"""What a session holds, and how quickly it answers."""

import time

import jax
import numpy as np

from adacm2_jax.inference import evidence
from adacm2_jax.inference.session import Session


def kept_patches(session: Session, question: str = "") -> list[np.ndarray]:
    """The tokens that the memory of a question holds; see ``evidence.kept_patches``.

    Args:
      session: any.
      question: one that it knows; for any other those of the open memory.
    """
    if session.state.known is not None and question in session.questions:
        return evidence.kept_patches(session.state.known, session.questions.index(question))
    return evidence.kept_patches(session.state.open, 0)


def kept_frames(session: Session) -> set[int]:
    """The frames of which any memory holds tokens, by their numbers from 0; and the newest."""
    memories = [kept_patches(session, question) for question in (*session.questions, "")]
    frames = {int(frame) for layers in memories for pairs in layers for frame in pairs[:, 0]}
    return frames | ({session.seen - 1} if session.seen else set())


def first_token(session: Session, question: str) -> float:
    """Seconds from a question to the first token of its answer, measured now.

    Asks twice and lets only the second count: the first may compile.

    Raises:
      UserError: as ``Session.ask``.
    """
    seconds = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        found = session.write(session.look(question), max_new_tokens=1, min_new_tokens=0)
        jax.block_until_ready(found.ids)
        seconds = time.perf_counter() - begun
    return seconds
