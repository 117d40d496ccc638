"""Sessions: a stream of frames that may be asked at any moment, in constant memory.

The values and the compiled steps are in ``session_steps.py``. A :class:`Session` holds one such
value, and a :class:`SessionModel` what all sessions of a model share.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from adacm2_jax.config import AdaCM2Config, MemoryConfig, from_dict, to_dict
from adacm2_jax.errors import DataError, UserError, check_kind, check_text, printable, reason
from adacm2_jax.files import check_writable, write_bytes
from adacm2_jax.inference import evidence, session_steps, steps
from adacm2_jax.inference.answerer import Answer
from adacm2_jax.inference.generate import GenerationConfig
from adacm2_jax.inference.processor import Processor
from adacm2_jax.inference.reply import Moment, Reply
from adacm2_jax.inference.session_steps import SessionModels, SessionState
from adacm2_jax.memory.policies import plan_for
from adacm2_jax.models.adacm2 import AdaCM2, Question, StreamState
from adacm2_jax.video.sampling import Sampling
from adacm2_jax.video.stream import VideoFile, lock_step, open_video

#: Of the file's own form, in every saved session.
_VERSION = 1


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

    def models(self, memory: MemoryConfig) -> SessionModels:
        """The networks with the memory of known questions, and with an open one."""
        opened = dataclasses.replace(self.config, memory=memory)
        return SessionModels(AdaCM2(self.config), AdaCM2(opened))


class Session:
    """A stream of frames, asked about at any moment; made by ``VideoModel.session``.

    What it knows is ``state``, a value of constant size; everything else is fixed when it begins.

    Attributes:
      questions: that are known: each has a memory of its own.
      seconds_per_frame: between two frames.
      state: all that is known of the frames so far.
    """

    def __init__(
        self,
        model: SessionModel,
        questions: Sequence[str],
        seconds_per_frame: float,
        memory: MemoryConfig,
        state: SessionState | None = None,
    ):
        self.questions, self.seconds_per_frame = tuple(questions), seconds_per_frame
        self._model, self._memory = model, memory
        self._models = model.models(memory)
        self._known = self._encode(self.questions) if self.questions else None
        self._generic = self._encode([""])
        self.state = state or session_steps.begin(self._models, 1, len(self.questions))

    # --- What it knows -------------------------------------------------------------------------

    @property
    def seen(self) -> int:
        """Frames pushed so far."""
        return int(self.state.seen[0])

    @property
    def size(self) -> int:
        """Bytes of the state; they never change."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))

    @property
    def kept(self) -> int:
        """Visual tokens that are kept, in the layer that holds most: of all known questions and of
        the open memory. The newest frame, held back whole, is not counted."""
        memories = [state.memory for state in (self.state.known, self.state.open) if state]
        return sum(int(memory.tokens_kept.sum()) for memory in memories)

    @property
    def bound(self) -> int:
        """What ``kept`` never exceeds."""
        config, each = self._model.config, 0
        if self.questions and config.memory.policy == "merge":
            each = config.memory.bank_frames * config.vision.tokens_per_frame
        elif self.questions:
            each = plan_for(config).capacity
        return each * len(self.questions) + plan_for(self._models.open.config).capacity

    # --- Frames in -----------------------------------------------------------------------------

    def push(
        self,
        frames: np.ndarray | str | os.PathLike,
        *,
        start: float | None = None,
        end: float | None = None,
    ) -> int:
        """Reads frames, or a video file to its end, one frame every ``seconds_per_frame``.

        In which pieces frames come does not matter: the same tokens are kept.

        Args:
          frames: uint8[T, height, width, 3], RGB, or one frame without T; or the path of a file.
          start, end: of a file, the part that counts, seconds.

        Returns:
          Frames seen so far.

        Raises:
          UserError: for an array of another kind.
          DataError: if the video cannot be read to its end; the frames before are known then.
        """
        if isinstance(frames, (str, os.PathLike)):
            self._push_file(os.fspath(frames), start, end)
        else:
            if start is not None or end is not None:
                raise UserError("start and end are parts of a file; cut an array before it comes")
            self._push_array(frames)
        return self.seen

    def _push_array(self, frames: Any) -> None:
        from adacm2_jax.video.resize import RESIZES

        frames = np.asarray(frames)
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise UserError(
                f"frames are {frames.dtype}{list(frames.shape)}; give uint8[T, height, width, 3], "
                "RGB"
            )
        if not all(frames.shape[1:3]):
            raise UserError(f"frames are {list(frames.shape)}, without a pixel; give pictures")
        shrink, size = RESIZES[self._model.resize], self._model.config.vision.image_size
        chunk = self._model.chunk
        for first in range(0, len(frames), chunk):
            part = frames[first : first + chunk]
            pictures = np.zeros((chunk, size, size, 3), np.uint8)
            for place, picture in enumerate(part):
                pictures[place] = shrink(picture, size)
            self._advance(pictures[None], (np.arange(chunk) < len(part))[None])

    def _push_file(self, path: str, start: float | None, end: float | None) -> None:
        size, chunk = self._model.config.vision.image_size, self._model.chunk
        row = open_video(
            VideoFile(check_text(path, "a path"), start, end),
            size=size,
            chunk=chunk,
            sampling=Sampling("fps", fps=1 / self.seconds_per_frame),
            resize=self._model.resize,
            on_truncated=self._model.on_truncated,
            on_warning=lambda line: print(f"warning: {line}", file=sys.stderr),
        )
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            for frames, valid in lock_step([row], pool, 1, chunk, size):
                self._advance(frames, valid)
        if row.error:
            raise DataError(row.error)

    def _advance(self, frames: np.ndarray, valid: np.ndarray) -> None:
        params = self._model.params
        features = steps.encode(self._models.open, params, frames)
        self.state = session_steps.push(
            self._models, params, self.state, features, valid, self._known, self._generic
        )

    # --- Questions -----------------------------------------------------------------------------

    def ask(self, question: str | None = None, *, moments: int = 5) -> Any:
        """Answers now, and leaves the stream as it is.

        A question that was given at the beginning is answered from its own memory, any other from
        the open one.

        Args:
          question: by default all that are known.
          moments: how many of the remembered frames an answer names.

        Returns:
          A :class:`Reply`; without a question a list of them, of all that are known.

        Raises:
          UserError: for a question that is too long, or if there has been no frame.
        """
        if not self.seen:
            raise UserError("the session has seen no frame yet; push some before you ask")
        if question is None:
            return self._known_replies(range(len(self.questions)), moments)
        check_text(check_kind(question, str, "question", "a text"), "a question")
        if question in self.questions:
            return self._known_replies([self.questions.index(question)], moments)[0]
        asked = self._encode([question])
        queries = session_steps.ask_late(self._models, self._model.params, self.state, asked)
        return self._reply(question, asked, queries, self.state.open, 0, "open", moments)

    def _known_replies(self, numbers: Sequence[int], moments: int) -> list[Reply]:
        """Of known questions by their numbers; all read the newest frame together."""
        state, known = self.state.known, self._known
        if state is None or known is None:
            return []
        queries = session_steps.ask_known(self._models, self._model.params, self.state, known)
        policy, replies = self._model.config.memory.policy, []
        for number in numbers:
            row = slice(number, number + 1)
            asked = jax.tree.map(lambda leaf, row=row: leaf[row], known)
            question = self.questions[number]
            replies.append(
                self._reply(question, asked, queries[row], state, number, policy, moments)
            )
        return replies

    def _reply(
        self,
        question: str,
        asked: Question,
        queries: jax.Array,
        state: StreamState,
        row: int,
        policy: str,
        moments: int,
    ) -> Reply:
        model = self._model
        options = dataclasses.replace(
            model.generation, eos_ids=(model.processor.eos_id,), pad_id=model.processor.pad_id
        )
        found = steps.answer(
            steps.any_policy(model.config),
            model.params,
            queries,
            asked,
            options,
            jax.random.key(0),
            np.zeros(1, np.int32),
        )
        best = tuple(
            Answer(model.processor.decode(ids), float(score))
            for ids, score in zip(
                np.asarray(found.ids)[0], np.asarray(found.scores)[0], strict=True
            )
        )
        (kept,) = evidence.remembered(state, np.array([row]))
        total = self.seen * model.config.vision.tokens_per_frame
        return Reply(
            video="",
            question=question,
            answer=best[0].text,
            score=best[0].score,
            n_best=best,
            policy=policy,
            frames=self.seen,
            kept_tokens=kept.kept_tokens,
            total_tokens=total,
            moments=tuple(
                Moment(each.frame * self.seconds_per_frame, each.tokens, each.score)
                for each in kept.frames[:moments]
            ),
        )

    def _encode(self, questions: Sequence[str]) -> Question:
        prompts = [self._model.ask_as(question) if question else "" for question in questions]
        return self._model.processor.questions(prompts, self._model.processor.width(prompts))

    # --- Copies --------------------------------------------------------------------------------

    def fork(self) -> "Session":
        """Another session with the same past and a future of its own."""
        state = jax.tree.map(lambda leaf: leaf.copy(), self.state)
        return Session(self._model, self.questions, self.seconds_per_frame, self._memory, state)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the session to one file (safetensors), which gets its name when it is complete.

        Raises:
          UserError: if it cannot be written.
        """
        from safetensors.flax import save

        path = pathlib.Path(path)
        check_writable(path.parent, f"the session goes to {path}")
        about = {
            "version": _VERSION,
            "model": self._model.fingerprint(),
            "questions": self.questions,
            "seconds_per_frame": self.seconds_per_frame,
            "known": to_dict(self._model.config.memory),
            "open": to_dict(self._memory),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save(_named(self.state), {"adacm2": json.dumps(about)}))


def resume(model: SessionModel, path: str | os.PathLike) -> Session:
    """A session that :meth:`Session.save` wrote, with the very same state.

    Args:
      model: with the parameters that it was saved with; which memories it has is in the file.
      path: of the file.

    Raises:
      UserError: for a file that is none or damaged, and for one of another model.
    """
    about, leaves = _read(pathlib.Path(path))
    if about["model"] != model.fingerprint():
        raise UserError(
            f"the session {path} is of another model (fingerprint {about['model'][:12]}, not "
            f"{model.fingerprint()[:12]}); open the run or the checkpoint that it was saved with"
        )
    known, opened = (from_dict(about[name], MemoryConfig) for name in ("known", "open"))
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, memory=known))
    session = Session(model, about["questions"], about["seconds_per_frame"], opened)
    expected = _named(session.state)
    shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    if shapes != {name: (leaf.shape, leaf.dtype) for name, leaf in expected.items()}:
        raise UserError(f"the session {path} is damaged: its arrays are not those of a session")
    session.state = jax.tree.unflatten(
        jax.tree.structure(session.state), [leaves[name] for name in expected]
    )
    return session


def _read(path: pathlib.Path) -> tuple[dict, dict[str, jax.Array]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"there is no session at {path}; give a file that Session.save wrote")
    try:
        with safe_open(path, framework="flax") as file:
            about = json.loads((file.metadata() or {})["adacm2"])
            leaves = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is no session, or damaged ({printable(reason(error))}); give a file that "
            "Session.save wrote"
        ) from error
    if about.get("version") != _VERSION:
        raise UserError(
            f"the session {path} has form {about.get('version')}, this version reads {_VERSION}; "
            "resume it with the version that saved it"
        )
    return about, leaves


def _named(state: SessionState) -> dict[str, jax.Array]:
    """The leaves of a state by name, in its order."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
