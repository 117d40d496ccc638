"""Which visual tokens are kept: the policies and their settings."""

import dataclasses

from adacm2_jax.config.checks import Ratio, as_fraction, check_numbers, one_of
from adacm2_jax.errors import UserError

POLICIES = ("adacm2", "full", "recent", "recent_frames", "uniform", "random", "budget", "merge")
#: Those that rank tokens by a score: with novelty, decay or a choice for all layers, if wanted.
SCORED = ("adacm2", "budget")
SCORE_ROWS = ("query", "text", "query+text")


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Which visual tokens are kept from frame to frame.

    Attributes:
      policy: one of :data:`POLICIES`; see ``memory/policies.py`` and ``memory/banks.py``.
      recent_ratio: ρ, the share of the live tokens, newest first, that is kept whole; one value, or
        one for each cross-attention layer (a tuple, or text such as ``"0.1,0.2"``).
      conserve_ratio: β, the share of the older tokens, best score first, that is kept; likewise.
      score_rows: the rows whose attention scores a token: ``query`` (as ported checkpoints expect),
        ``text`` or ``query+text``.
      max_frames: ``full`` only: the longest video that it must hold; of a longer one it holds the
        newest ``max_frames`` frames.
      recent_frames: ``recent_frames`` only: N, the frames that an answer is read from, the newest
        included; all of their tokens, and nothing older.
      capacity: ``budget`` only: the tokens that a layer holds before anything is dropped.
      novelty: of ``adacm2`` and ``budget``: w in the score (1 − w) · attention + w · novelty, where
        novelty is how unlike all older tokens one is; see ``memory/slots.py``. With 1 no question
        is needed to choose.
      decay: of ``adacm2`` and ``budget``: d in the running score (1 − d) · score + d · before, with
        what the token had after the frame before. 0, as in the paper: a token is judged by the
        newest frame's attention alone.
      shared_choice: of ``adacm2`` and ``budget``: all layers keep the same tokens, those with the
        highest mean score over the layers. Reads frame by frame, which is slower.
      bank_frames: ``merge`` only: M, the frames that each bank holds (MA-LMM's memory_bank_length).
        No gradient passes through the banks.
    """

    policy: str = "adacm2"
    recent_ratio: Ratio | tuple[Ratio, ...] = "0.1"
    conserve_ratio: Ratio | tuple[Ratio, ...] = "0.1"
    score_rows: str = "query"
    max_frames: int = 0
    recent_frames: int = 0
    capacity: int = 0
    novelty: float = 0.0
    decay: float = 0.0
    shared_choice: bool = False
    bank_frames: int = 0

    def __post_init__(self):
        one_of("memory.policy", self.policy, POLICIES)
        one_of("memory.score_rows", self.score_rows, SCORE_ROWS)
        for field in ("recent_ratio", "conserve_ratio"):
            value = getattr(self, field)
            if isinstance(value, str) and "," in value:
                value = value.split(",")
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, field, value)
            for ratio in value if isinstance(value, tuple) else (value,):
                if not 0 <= as_fraction(ratio, f"memory.{field}") <= 1:
                    raise UserError(f"memory.{field} must be in [0, 1], not {ratio}")
        if self.policy == "full" and self.max_frames < 1:
            raise UserError(
                f"memory.max_frames is {self.max_frames}: policy 'full' keeps everything and must "
                "know the longest video; set it to that number of frames"
            )
        if self.policy == "budget" and self.capacity < 1:
            raise UserError(
                f"memory.capacity is {self.capacity}: policy 'budget' needs the number of tokens "
                "that a layer may hold"
            )
        if self.policy == "recent_frames" and self.recent_frames < 1:
            raise UserError(
                f"memory.recent_frames is {self.recent_frames}: policy 'recent_frames' needs the "
                "number of frames that an answer is read from; set it to 1 or more"
            )
        for field in ("novelty", "decay", "shared_choice"):
            value = getattr(self, field)
            if not 0 <= value <= 1:
                raise UserError(f"memory.{field} must be in [0, 1], not {value}")
            if value and self.policy not in SCORED:
                raise UserError(
                    f"memory.{field} is {value}, but policy {self.policy!r} has no score that it "
                    f"could change; use 'adacm2' or 'budget', or {field}={type(value)(0)}"
                )
        self._check_shared()
        if self.policy == "merge" and self.bank_frames < 1:
            raise UserError(
                f"memory.bank_frames is {self.bank_frames}: policy 'merge' needs the number of "
                "frames that a bank holds; set it to the checkpoint's (MA-LMM: 10 or 20)"
            )
        check_numbers(
            "memory",
            self,
            max_frames=0,
            recent_frames=0,
            capacity=0,
            bank_frames=0,
            novelty=0,
            decay=0,
        )

    def _check_shared(self) -> None:
        """Refuses one choice for all layers where layers cannot agree."""
        if not self.shared_choice:
            return
        if self.novelty == 1:
            raise UserError(
                "memory.shared_choice with memory.novelty = 1: a choice by novelty alone is each "
                "layer's own; lower memory.novelty, or leave memory.shared_choice out"
            )
        for field in ("recent_ratio", "conserve_ratio"):
            value = getattr(self, field)
            if isinstance(value, tuple) and len({as_fraction(ratio) for ratio in value}) > 1:
                raise UserError(
                    f"memory.shared_choice with memory.{field} = {value}: layers that keep the "
                    "same tokens have one ratio; give one value"
                )


def memory_preset(name: str) -> MemoryConfig:
    """The paper's two readings of α = β = 0.1.

    ``eq8`` (default): α is the recent share, as the paper's bound (Eq. 8) needs; keeps at most 60
    of 317 live tokens a layer at full size. ``eq6``: α is the older share, as its partition (Eq. 6)
    says; keeps at most 2,598 of 2,855.
    """
    presets = {
        "eq8": MemoryConfig(recent_ratio="0.1", conserve_ratio="0.1"),
        "eq6": MemoryConfig(recent_ratio="0.9", conserve_ratio="0.1"),
    }
    one_of("memory preset", name, tuple(presets))
    return presets[name]
