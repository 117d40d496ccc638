"""Videos in chunks, questions in text, answers out: inference with everything compiled once.

One :class:`Answerer` may run several memory policies over the same frames, which pass through the
ViT once: that is how policies are compared, and why their differences are the policies' own.
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from adacm2_jax.config import AdaCM2Config, MemoryConfig
from adacm2_jax.errors import UserError
from adacm2_jax.inference.generate import GenerationConfig, generate
from adacm2_jax.inference.processor import Processor
from adacm2_jax.inference.steps import encode, read
from adacm2_jax.models.adacm2 import AdaCM2, Question, StreamState, init_state, state_specs
from adacm2_jax.sharding import ROWS, to_host


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer of the n best.

    Attributes:
      text: as the language model wrote it.
      score: its (length-normalised) log-probability.
    """

    text: str
    score: float


@dataclasses.dataclass
class Reading:
    """Some videos being read, with what each policy makes of them.

    Attributes:
      question: of every row, on the device.
      rng: for sampling; the same for every policy.
      states: by policy.
      seconds: by policy, time spent so far; what all policies share is counted for each.
    """

    question: Question
    rng: jax.Array
    states: dict[str, StreamState]
    seconds: dict[str, float]


class Answerer:
    """The compiled functions of a model.

    Args:
      config: the model; its own memory is ignored.
      params: its parameters.
      processor: its tokenizers.
      memories: the memory policies to run, by the name they are reported under.
      generation: how answers are decoded.
      rng_seed: for sampling.
    """

    def __init__(
        self,
        config: AdaCM2Config,
        params: dict,
        processor: Processor,
        memories: dict[str, MemoryConfig],
        generation: GenerationConfig,
        rng_seed: int = 0,
    ):
        self._params, self._processor = params, processor
        self._generation = dataclasses.replace(
            generation, eos_ids=(processor.eos_id,), pad_id=processor.pad_id
        )
        self._rng = jax.random.key(rng_seed)
        sharding = jax.tree.leaves(params)[0].sharding
        #: Where the parameters lie; None on a single device.
        self._mesh: Any = sharding.mesh if isinstance(sharding, NamedSharding) else None
        self.models = {
            name: AdaCM2(dataclasses.replace(config, memory=memory))
            for name, memory in memories.items()
        }

    def start(
        self, questions: Sequence[str], total_frames: np.ndarray, seed: np.ndarray
    ) -> Reading:
        """Empty memories for rows of questions.

        Args:
          questions: one a row; the k rows of one video stand together.
          total_frames: int[B], frames that each row's video will have, 0 for an open end.
          seed: uint32[B], of each row's video, for the random policy.

        Raises:
          UserError: if a question is too long, or policy ``full`` cannot hold a video.
        """
        question = self._processor.questions(questions)
        longest = int(np.max(total_frames))
        for name, model in self.models.items():
            memory = model.config.memory
            if memory.policy == "full" and longest > memory.max_frames:
                raise UserError(
                    f"policy {name!r} holds at most {memory.max_frames} frames, the video has "
                    f"{longest}; raise memory.max_frames (for eval.py: eval.full_frames)"
                )
        states = {
            name: init_state(model.config, jnp.asarray(total_frames), jnp.asarray(seed))
            for name, model in self.models.items()
        }
        self._rng, rng = jax.random.split(self._rng)
        question = self._put(question, jax.tree.map(lambda _: ROWS, question))
        states = {name: self._put(state, state_specs(state)) for name, state in states.items()}
        return Reading(question, rng, states, dict.fromkeys(states, 0.0))

    def _put(self, tree: Any, specs: Any) -> Any:
        """On the mesh: divided as ``specs`` say where the videos divide, else everywhere."""
        if self._mesh is None:
            return jax.device_put(tree)

        def place(leaf, spec):
            axis = spec.index("data")
            divides = leaf.shape[axis] % self._mesh.shape["data"] == 0
            return NamedSharding(self._mesh, spec if divides else PartitionSpec())

        return jax.device_put(tree, jax.tree.map(place, tree, specs))

    def read(self, reading: Reading, frames: np.ndarray, valid: np.ndarray) -> None:
        """Reads a chunk into every policy's memory.

        Args:
          reading: changed in place.
          frames: uint8[videos, F, height, width, 3]; F is the same at every call.
          valid: bool[videos, F].
        """
        start = time.perf_counter()
        model = next(iter(self.models.values()))
        frames, valid = self._put((frames, valid), (ROWS, ROWS))
        with self._on_mesh():
            features = jax.block_until_ready(encode(model, self._params, frames))
        shared = time.perf_counter() - start
        for name, model in self.models.items():
            start = time.perf_counter()
            state = reading.states[name]
            with self._on_mesh():
                state = read(model, self._params, features, valid, reading.question, state)
            # Labelled alike, whatever the compiler chose: one program serves every chunk.
            reading.states[name] = jax.block_until_ready(self._put(state, state_specs(state)))
            reading.seconds[name] += shared + time.perf_counter() - start

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def answer(self, reading: Reading, name: str) -> list[list[Answer]]:
        """The answers under one policy: for each row the n best, best first.

        Raises:
          UserError: if the visual tokens are not finite (damaged weights, or an overflow).
        """
        start = time.perf_counter()
        state = reading.states[name]
        if not bool(jnp.isfinite(state.queries).all()):
            raise UserError(
                "the visual tokens are not finite: the parameters hold NaN or overflow in "
                f"{self.models[name].config.dtype}; check the checkpoint, or use dtype float32"
            )
        model, options = self.models[name], (self._generation, reading.rng)
        with self._on_mesh():
            generated = _generate(model, self._params, state, reading.question, *options)
        ids, scores = to_host((generated.ids, generated.scores))
        reading.seconds[name] += time.perf_counter() - start
        return [
            [
                Answer(self._processor.decode(ids[row, best]), float(scores[row, best]))
                for best in range(ids.shape[1])
            ]
            for row in range(ids.shape[0])
        ]


_generate = jax.jit(generate, static_argnums=(0, 4))
