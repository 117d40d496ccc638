"""Videos in chunks, questions in text, answers out: inference with everything compiled once.

The functions are in ``steps.py``; an :class:`Answerer` holds what they are called with, and a
:class:`Reading` what they leave.

One answerer may run several memory policies over the same frames, which pass through the ViT once:
that is how policies are compared, and why their differences are the policies' own.

Any number of questions is served by few programs: the questions of a video are filled up to 1, 2,
4, 8, 16, 32, 64, 96 … rows (:func:`bucket`), and what is answered in the rows that fill up is
dropped; their texts are padded to 16, 32, 64 … tokens.
"""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from adacm2_jax.config import AdaCM2Config, MemoryConfig
from adacm2_jax.errors import UserError
from adacm2_jax.inference import evidence, steps
from adacm2_jax.inference.generate import GenerationConfig
from adacm2_jax.inference.processor import Processor
from adacm2_jax.models.adacm2 import AdaCM2, Question, StreamState, init_state, state_specs
from adacm2_jax.sharding import ROWS, to_host

#: Rows are counted in powers of two up to this many, then in multiples of it.
_FEW = 32


def bucket(count: int) -> int:
    """The rows that ``count`` rows are filled up to: the next power of two, or multiple of 32."""
    if count > _FEW:
        return -(-count // _FEW) * _FEW
    return 1 << (count - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer of the n best.

    Attributes:
      text: as the language model wrote it.
      score: its (length-normalised) log-probability.
    """

    text: str
    score: float


@dataclasses.dataclass(frozen=True)
class Likelihoods:
    """How probable given texts are as answers to one question.

    Attributes:
      log_probs: float32[n]: the summed log-probability of each text's tokens.
      tokens: int32[n]: how many these are, the end token included.
    """

    log_probs: np.ndarray
    tokens: np.ndarray


@dataclasses.dataclass
class Reading:
    """Some videos being read, with what each policy makes of them.

    Attributes:
      texts: the questions, one a row.
      rows: int[rows]: where they stand among the filled-up rows of ``question`` and ``states``.
      question: of every filled-up row, on the device.
      rng: for sampling; the same for every policy.
      order: int32[filled-up rows], on the device: what each of them samples by.
      states: by policy.
      before: what is read in place of the questions up to the last frame, on the device; None:
        the questions.
      left: int[videos], frames that each still has, where ``before`` is given.
      videos: how many there are.
      began: ``time.perf_counter()`` at the start.
      seconds: of the whole pass, from the start to the end of the latest call. Chunks are computed
        while the caller decodes the next ones, for all policies, so it is not told apart further.
    """

    texts: list[str]
    rows: np.ndarray
    question: Question
    rng: jax.Array
    order: jax.Array
    states: dict[str, StreamState]
    before: Question | None
    left: np.ndarray
    videos: int
    began: float
    seconds: float = 0.0


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
        #: For what does not depend on the policy.
        self._model = steps.any_policy(config)
        self.models = {
            name: AdaCM2(dataclasses.replace(config, memory=memory))
            for name, memory in memories.items()
        }

    @property
    def processor(self) -> Processor:
        """Its tokenizers."""
        return self._processor

    def text_width(self, questions: Iterable[str]) -> int:
        """See ``Processor.width``."""
        return self._processor.width(questions)

    def start(
        self,
        questions: Sequence[str],
        total_frames: np.ndarray,
        seed: np.ndarray,
        text_width: int = 0,
        before: Sequence[str] | None = None,
    ) -> Reading:
        """Empty memories for rows of questions.

        Args:
          questions: k for each of V videos; those of one video stand together.
          total_frames: int[V], frames that each video will have, 0 for an open end.
          seed: uint32[V], of each video, for the random policy.
          text_width: of :meth:`text_width`; by default that of these questions.
          before: for each question what is read in its place up to the last frame, of a question
            that comes late: what the memory holds is then chosen without it. The lengths of the
            videos must be known.

        Raises:
          UserError: if a question is too long, or policy ``full`` cannot hold a video.
          ValueError: if the questions do not divide over the videos, or what is read before them
            is of another number.
        """
        began = time.perf_counter()
        texts, videos = list(questions), len(total_frames)
        if not videos or not texts or len(texts) % videos or len(seed) != videos:
            raise ValueError(
                f"{len(texts)} question(s) and {len(seed)} seed(s) for {videos} video(s): give as "
                "many questions for each video, and one length and one seed a video"
            )
        if before is not None and (len(before) != len(texts) or not np.all(total_frames)):
            raise ValueError(
                f"{len(before)} text(s) to read before {len(texts)} question(s): give one a "
                "question, and the length of each video"
            )
        longest = int(np.max(np.asarray(total_frames)))
        for name, model in self.models.items():
            memory = model.config.memory
            if memory.policy == "full" and longest > memory.max_frames:
                raise UserError(
                    f"policy {name!r} holds at most {memory.max_frames} frames, the video has "
                    f"{longest}; raise memory.max_frames (for eval.py: eval.full_frames)"
                )
        each = len(texts) // videos
        filled = bucket(each)
        # A row that fills up is the video's last question once more: it ends when that one does.
        order = np.minimum(np.arange(filled), each - 1) + each * np.arange(videos)[:, None]
        rows = (np.arange(each) + filled * np.arange(videos)[:, None]).reshape(-1)
        order = order.reshape(-1).astype(np.int32)
        width = text_width or self.text_width([*texts, *(before or ())])

        def encoded(texts: list[str]) -> Question:
            question = self._processor.questions([texts[row] for row in order], width)
            return self._put(question, jax.tree.map(lambda _: ROWS, question))

        per_row: Any = [np.repeat(np.asarray(each), filled) for each in (total_frames, seed)]
        states = {name: init_state(model.config, *per_row) for name, model in self.models.items()}
        self._rng, rng = jax.random.split(self._rng)
        return Reading(
            texts=texts,
            rows=rows,
            question=encoded(texts),
            rng=rng,
            order=self._put(order, ROWS),
            states={name: self._put(state, state_specs(state)) for name, state in states.items()},
            before=None if before is None else encoded(list(before)),
            left=np.array(total_frames),
            videos=videos,
            began=began,
            seconds=time.perf_counter() - began,
        )

    def read(self, reading: Reading, frames: np.ndarray, valid: np.ndarray) -> None:
        """Reads a chunk into every policy's memory.

        Returns when the chunk before has been read; this one may still be under way.

        Args:
          reading: changed in place.
          frames: uint8[V, F, height, width, 3]; F is the same at every call.
          valid: bool[V, F].

        Raises:
          ValueError: for frames of another number of videos.
        """
        if len(frames) != reading.videos:
            raise ValueError(
                f"frames of {len(frames)} video(s), but the reading was started for "
                f"{reading.videos}"
            )
        passes = [(valid, reading.question)]
        if reading.before is not None:
            number = np.cumsum(valid, axis=1)
            last = valid & (number == reading.left[:, None])
            passes = [(valid & ~last, reading.before), (last, reading.question)]
            reading.left = reading.left - number[:, -1]
        frames = self._put(frames, ROWS)
        with self._on_mesh():
            encode = steps.encoder(self._model.config)
            features = encode(self._model, self._params, frames)
        if self._in_lock_step():
            jax.block_until_ready(features)
        # Two chunks at most are on the device: the one before ends while this one is encoded.
        jax.block_until_ready(reading.states)
        for own, question in passes:
            if own.any() or reading.before is None:  # padding alone compiles: who times, begins so
                self._read(reading, features, self._put(own, ROWS), question)
        reading.seconds = time.perf_counter() - reading.began

    def _read(
        self, reading: Reading, features: jax.Array, valid: jax.Array, question: Question
    ) -> None:
        for name, model in self.models.items():
            state = reading.states[name]
            with self._on_mesh():
                state = steps.read(model, self._params, features, valid, question, state)
            # Labelled alike, whatever the compiler chose: one program serves every chunk.
            reading.states[name] = self._put(state, state_specs(state))
            if self._in_lock_step():
                jax.block_until_ready(reading.states[name])

    def answer(self, reading: Reading, name: str, at_once: int = 0) -> list[list[Answer]]:
        """The answers under one policy: for each row the n best, best first.

        Args:
          reading: after the last frame.
          name: of the policy.
          at_once: for how many rows the language model writes together; 0: for all.

        Raises:
          UserError: if the visual tokens are not finite (damaged weights, or an overflow).
        """
        given = self._queries(reading, name), reading.question, reading.order
        count = len(given[0])
        size = min(at_once or count, count)
        parts = []
        for start in range(0, count, size):
            # The last part reaches back into the one before: one program serves all.
            rows = np.arange(size) + min(start, count - size)
            part = given if size == count else jax.tree.map(lambda leaf, at=rows: leaf[at], given)
            queries, question, order = part
            options = self._generation, reading.rng, order
            with self._on_mesh():
                found = steps.answer(self._model, self._params, queries, question, *options)
            new = start - count  # counted from the end
            parts.append([leaf[max(new, -size) :] for leaf in to_host((found.ids, found.scores))])
        ids, scores = map(np.concatenate, zip(*parts, strict=True))
        reading.seconds = time.perf_counter() - reading.began
        return [
            [
                Answer(self._processor.decode(ids[row, best]), float(scores[row, best]))
                for best in range(ids.shape[1])
            ]
            for row in reading.rows
        ]

    def digest(self) -> str:
        """Tells these parameters from others: by their names and shapes, the sum of each, and that
        of its squares."""
        leaves = jax.tree_util.tree_leaves_with_path(self._params)
        with self._on_mesh():
            sums = np.asarray(to_host(steps.sums([leaf for _, leaf in leaves])))
        named = [(jax.tree_util.keystr(path), str(leaf.dtype), leaf.shape) for path, leaf in leaves]
        return hashlib.sha256(repr(named).encode() + sums.tobytes()).hexdigest()[:16]

    def skip(self, readings: int) -> None:
        """Goes on as if so many readings had been started: what samples is as it would be then."""
        for _ in range(readings):
            self._rng, _ = jax.random.split(self._rng)

    def first_token(self, reading: Reading, name: str) -> float:
        """Seconds from the questions to the first token of their answers, under one policy; the
        first call compiles."""
        begun = time.perf_counter()
        options = dataclasses.replace(self._generation, max_new_tokens=1, min_new_tokens=0)
        rest = options, reading.rng, reading.order
        with self._on_mesh():
            found = steps.answer(
                self._model, self._params, self._queries(reading, name), reading.question, *rest
            )
        jax.block_until_ready(found.ids)
        return time.perf_counter() - begun

    def log_likelihoods(
        self, reading: Reading, name: str, candidates: Sequence[Sequence[str]]
    ) -> list[Likelihoods]:
        """How probable given texts are as answers, under one policy.

        Args:
          reading: after the last frame.
          name: of the policy.
          candidates: for each row the texts, of any number.

        Raises:
          UserError: if a candidate is too long, or the visual tokens are not finite.
          ValueError: if there are candidates for another number of rows.
        """
        if len(candidates) != len(reading.texts):
            raise ValueError(
                f"candidates for {len(candidates)} row(s), but there are {len(reading.texts)}"
            )
        queries = self._queries(reading, name)
        pairs = [(row, text) for row, texts in enumerate(candidates) for text in texts]
        log_probs = np.zeros(len(pairs), np.float32)
        tokens = np.zeros(len(pairs), np.int32)
        size = min(bucket(len(pairs)), _FEW) if pairs else 0
        for start in range(0, len(pairs), size or 1):
            part = pairs[start : start + size]
            filled = part + [part[-1]] * (size - len(part))
            rows, texts = zip(*filled, strict=True)
            asked = [reading.texts[row] for row in rows]
            question, targets = self._processor.candidates(asked, texts)
            places = self._put(reading.rows[list(rows)].astype(np.int32), ROWS)
            given = self._put((question, targets), (jax.tree.map(lambda _: ROWS, question), ROWS))
            with self._on_mesh():
                found = steps.log_likelihood(self._model, self._params, queries, places, *given)
            log_probs[start : start + size] = to_host(found)[: len(part)]
            tokens[start : start + size] = targets.sum(1)[: len(part)]
        reading.seconds = time.perf_counter() - reading.began
        ends = np.cumsum([len(texts) for texts in candidates])[:-1]
        each = zip(np.split(log_probs, ends), np.split(tokens, ends), strict=True)
        return [Likelihoods(*arrays) for arrays in each]

    @property
    def tokens_per_frame(self) -> int:
        """P, visual tokens of a frame."""
        return self._model.config.vision.tokens_per_frame

    def remembered(self, reading: Reading, name: str) -> list[evidence.Remembered]:
        """What each row still holds of its video under one policy."""
        return evidence.remembered(reading.states[name], reading.rows)

    def kept_patches(self, reading: Reading, name: str, row: int) -> list[np.ndarray]:
        """The (frame, patch) pairs that one row holds, layer by layer; see ``evidence.py``."""
        return evidence.kept_patches(reading.states[name], int(reading.rows[row]))

    def _queries(self, reading: Reading, name: str) -> jax.Array:
        """What the last frame left of the queries under one policy, once that is known."""
        queries = reading.states[name].queries
        if not bool(jnp.isfinite(queries).all()):
            raise UserError(
                "the visual tokens are not finite: the parameters hold NaN or overflow in "
                f"{self._model.config.dtype}; check the checkpoint, or use dtype float32"
            )
        return queries

    def _put(self, tree: Any, specs: Any) -> Any:
        """On the mesh: divided as ``specs`` say where the videos divide, else everywhere."""
        if self._mesh is None:
            return jax.device_put(tree)

        def place(leaf, spec):
            axis = spec.index("data")
            divides = leaf.shape[axis] % self._mesh.shape["data"] == 0
            return NamedSharding(self._mesh, spec if divides else PartitionSpec())

        return jax.device_put(tree, jax.tree.map(place, tree, specs))

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _in_lock_step(self) -> bool:
        """Whether steps must not overlap: devices that share the cores of a CPU may wait for each
        other for ever."""
        if self._mesh is None or self._mesh.size == 1:
            return False
        return self._mesh.devices.flat[0].platform == "cpu"
