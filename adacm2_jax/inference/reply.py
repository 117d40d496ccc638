"""What a question about a video is answered with."""

import dataclasses

from adacm2_jax.inference.answerer import Answer


@dataclasses.dataclass(frozen=True)
class Moment:
    """A frame that is still remembered.

    Attributes:
      time: seconds from the video's beginning.
      tokens: of this frame, how many are kept, all layers together.
      score: the cross-attention that they received last, summed.
    """

    time: float
    tokens: int
    score: float


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer and what it rests on.

    Attributes:
      video: path of the file.
      question: as it was asked.
      answer: as the language model wrote it.
      score: its (length-normalised) log-probability.
      n_best: all answers that were wanted, best first.
      policy: of the memory.
      frames: that were read.
      kept_tokens: visual tokens that a layer holds in the end, at most.
      total_tokens: visual tokens that the frames had.
      moments: the frames that are remembered most, most first; empty where every token is kept, and
        under policy ``merge``, whose means belong to no frame.
    """

    video: str
    question: str
    answer: str
    score: float
    n_best: tuple[Answer, ...]
    policy: str
    frames: int
    kept_tokens: int
    total_tokens: int
    moments: tuple[Moment, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A label and how likely it is as the answer.

    Attributes:
      label: the text.
      log_likelihood: sum over its tokens, its end included.
      probability: among the labels that were given; they sum to 1.
    """

    label: str
    log_likelihood: float
    probability: float
