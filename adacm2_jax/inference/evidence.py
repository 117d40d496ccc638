"""What an answer rests on: the part of a video that a memory still holds."""

import dataclasses

import numpy as np

from adacm2_jax.models.adacm2 import StreamState
from adacm2_jax.sharding import to_host


@dataclasses.dataclass(frozen=True)
class RememberedFrame:
    """A frame of which some tokens are still held.

    Attributes:
      frame: its number among the frames that were read, from 0.
      tokens: how many of its tokens are held, over all layers.
      score: what these were ranked by after the last frame, summed: under ``adacm2`` and ``budget``
        the attention that they received.
    """

    frame: int
    tokens: int
    score: float


@dataclasses.dataclass(frozen=True)
class Remembered:
    """What is left of a video under one policy.

    Attributes:
      frames_seen: frames that were read.
      kept_tokens: tokens in the layer that holds most.
      frames: those that still have tokens, most tokens first; of as many the higher score, then the
        earlier frame. Empty under ``merge``, whose means belong to no frame.
    """

    frames_seen: int
    kept_tokens: int
    frames: tuple[RememberedFrame, ...]


def remembered(state: StreamState, rows: np.ndarray) -> list[Remembered]:
    """What rows of a state remember.

    Args:
      state: after some frames.
      rows: int[n], which rows.
    """
    seen, kept, tokens = to_host(
        (state.frames_seen, state.memory.tokens_kept, state.memory.in_time_order())
    )
    found = []
    for row in rows:
        own = {name: leaf[:, row] for name, leaf in tokens.items()}
        frames = _by_frame(own["frame"][own["live"]], own["score"][own["live"]])
        found.append(Remembered(int(seen[row]), int(kept[row]), frames))
    return found


def kept_patches(state: StreamState, row: int) -> list[np.ndarray]:
    """Which tokens one row of a state holds, layer by layer.

    Returns:
      For each cross-attention layer int32[n, 2]: frame, and place in it (0 is CLS, then the patches
      row by row), oldest first. No layers under ``merge``.
    """
    tokens = to_host(state.memory.in_time_order())
    layers = zip(*(tokens[name][:, row] for name in ("frame", "patch", "live")), strict=True)
    return [np.stack([frame[live], patch[live]], axis=1) for frame, patch, live in layers]


def _by_frame(frames: np.ndarray, scores: np.ndarray) -> tuple[RememberedFrame, ...]:
    """One entry a frame from one entry a token."""
    numbers, place = np.unique(frames, return_inverse=True)
    tokens = np.bincount(place, minlength=len(numbers))
    score = np.bincount(place, weights=scores, minlength=len(numbers))
    order = np.lexsort((numbers, -score, -tokens))
    return tuple(RememberedFrame(int(numbers[i]), int(tokens[i]), float(score[i])) for i in order)
