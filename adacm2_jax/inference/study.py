"""What an answer about a video rests on and what it costs, measured while the video is read."""

import dataclasses
import functools
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from adacm2_jax.config import AdaCM2Config, MemoryConfig
from adacm2_jax.inference.answerer import Answerer, Reading
from adacm2_jax.inference.reply import Reply
from adacm2_jax.memory.policies import bound_of
from adacm2_jax.models.adacm2 import init_state
from adacm2_jax.video.stream import Row


@dataclasses.dataclass(frozen=True)
class Line:
    """A number of bytes that grows by as much with every frame: ``first + frames · each``."""

    first: int
    each: int

    def at(self, frames: int) -> int:
        """The bytes after so many frames."""
        return self.first + frames * self.each


@dataclasses.dataclass(frozen=True)
class Study:
    """All answers about a video, what they rest on and what they cost.

    Attributes:
      replies: of the first policy, one a question.
      beside: of every other policy by its name, likewise.
      kept: for each question and each cross-attention layer int32[n, 2], the frame and the place
        in it of every token that the first policy kept; no layers under ``merge``.
      times: float64[T], instants of the frames, seconds from the file's start.
      grid: patches of a frame, rows and columns.
      bound: the most tokens that a layer can ever keep; None if they grow with the video.
      bytes: for each chunk the frames read so far and the bytes of one question's memory.
      keep_all: bytes of a memory that keeps every token.
      frame_ms: milliseconds a frame: decoding, the vision network and all memories.
      first_token_ms: milliseconds from the questions to the first token of their answers.
    """

    replies: tuple[Reply, ...]
    beside: Mapping[str, tuple[Reply, ...]]
    kept: tuple[tuple[np.ndarray, ...], ...]
    times: np.ndarray
    grid: tuple[int, int]
    bound: int | None
    bytes: tuple[tuple[int, int], ...]
    keep_all: Line
    frame_ms: float
    first_token_ms: float


class Watch:
    """Measures a reading. Programs are compiled before the clock starts."""

    def __init__(self) -> None:
        self._frames = 0
        self._bytes: list[tuple[int, int]] = []
        self._begun = self._seconds = 0.0

    def begin(
        self, answerer: Answerer, reading: Reading, frames: int, shape: tuple[int, ...]
    ) -> None:
        """Compiles with a chunk that counts for nothing, then starts the clock.

        Args:
          answerer: that reads.
          reading: before its first frame.
          frames: of the video.
          shape: of a chunk.
        """
        trial = answerer.start(reading.texts, np.array([frames]), np.zeros(1, np.uint32))
        answerer.read(trial, np.zeros(shape, np.uint8), np.zeros(shape[:2], bool))
        jax.block_until_ready(trial.states)
        answerer.first_token(trial, next(iter(trial.states)))
        self._begun = time.perf_counter()

    def chunk(self, reading: Reading, frames: int) -> None:
        """Notes the memory's size after a chunk of so many frames."""
        self._frames += frames
        state = next(iter(reading.states.values()))
        bytes_ = sum(leaf.nbytes for leaf in jax.tree.leaves(state.memory))
        self._bytes.append((self._frames, bytes_ // len(reading.order)))

    def end(self, reading: Reading) -> None:
        """Stops the clock once the last frame is read."""
        jax.block_until_ready(reading.states)
        self._seconds = time.perf_counter() - self._begun

    def study(
        self,
        answerer: Answerer,
        reading: Reading,
        row: Row,
        replies: Mapping[str, tuple[Reply, ...]],
    ) -> Study:
        """What was found; the first policy is the one that is looked at."""
        name, *others = replies
        config = answerer.models[name].config
        side = config.vision.image_size // config.vision.patch_size
        return Study(
            replies=replies[name],
            beside={other: replies[other] for other in others},
            kept=tuple(
                tuple(answerer.kept_patches(reading, name, number))
                for number in range(len(reading.rows))
            ),
            times=row.times,
            grid=(side, side),
            bound=None if config.memory.policy == "full" else bound_of(config),
            bytes=tuple(self._bytes),
            keep_all=keep_all(config),
            frame_ms=1e3 * self._seconds / self._frames,
            first_token_ms=1e3 * answerer.first_token(reading, name),
        )


@functools.lru_cache(maxsize=8)
def keep_all(config: AdaCM2Config) -> Line:
    """Bytes of a memory that keeps every token of a video, as it would be allocated."""

    def size(frames: int) -> int:
        memory = MemoryConfig(policy="full", max_frames=frames)
        whole = dataclasses.replace(config, memory=memory)
        state = jax.eval_shape(lambda: init_state(whole, jnp.zeros((1,), jnp.int32)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.memory))

    each = size(2) - size(1)
    return Line(size(1) - each, each)
