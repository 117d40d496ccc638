"""What all sessions of a model share, and the memory of questions that nobody has asked yet."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

from adacm2_jax.config import AdaCM2Config, MemoryConfig
from adacm2_jax.inference.generate import GenerationConfig
from adacm2_jax.inference.processor import Processor
from adacm2_jax.inference.session_steps import SessionModels, SessionState
from adacm2_jax.models.adacm2 import AdaCM2, Question


def open_memory(tokens: int) -> MemoryConfig:
    """The memory of questions that nobody has asked yet: two tokens of each kind, as many kinds as
    it holds; see ``slots.novelty``."""
    return MemoryConfig(policy="budget", capacity=tokens, recent_ratio=0, novelty=1.0)


@dataclasses.dataclass(frozen=True)
class SessionModel:
    """What all sessions of one model share; each function is compiled once for all of them.

    Attributes:
      config: the model; its memory is that of known questions.
      params: its parameters.
      processor: its tokenizers.
      generation: how answers are decoded.
      ask_as: a question → what the networks read.
      chunk: F, frames that pass through the networks together.
      resize: how frames are made square; see ``video/resize.py``.
      on_truncated: of a file that is cut short: ``error`` or ``use``.
      fingerprint: called for what tells the parameters from others'.
      narrowest: tokens that questions are padded to at least, so that more of them have one shape.
    """

    config: AdaCM2Config
    params: dict
    processor: Processor
    generation: GenerationConfig
    ask_as: Callable[[str], str]
    chunk: int
    resize: str
    on_truncated: str
    fingerprint: Callable[[], str]
    narrowest: int = 0

    def models(self, memory: MemoryConfig) -> SessionModels:
        """The networks with the memory of known questions, and with an open one."""
        opened = dataclasses.replace(self.config, memory=memory)
        return SessionModels(AdaCM2(self.config), AdaCM2(opened))

    def placed(self, state: SessionState) -> SessionState:
        """A state that lies as every other, on the parameters' one device: JAX compiles once more
        for arrays that lie there but say so in other words. Nothing is copied."""
        where = jax.tree.leaves(self.params)[0].sharding
        if not isinstance(where, NamedSharding) or where.mesh.size > 1:
            return state
        return jax.device_put(state, NamedSharding(where.mesh, PartitionSpec()))

    def encode(self, questions: Sequence[str]) -> Question:
        """Questions as the networks read them, a row each.

        Raises:
          UserError: for one that is too long.
        """
        prompts = [self.ask_as(question) if question else "" for question in questions]
        width = max(self.processor.width(prompts), self.narrowest)
        return self.processor.questions(prompts, width)
