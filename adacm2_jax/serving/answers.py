"""The answers that an engine is writing, each in a row of a table, a token at a time.

All of this is called by one thread, the engine's.
"""

import dataclasses
import logging
import time
from collections.abc import Callable

import jax
import numpy as np

from adacm2_jax.inference import continuous, steps
from adacm2_jax.inference.answerer import Answer
from adacm2_jax.inference.reply import Reply
from adacm2_jax.inference.session import Look, Session, SessionModel
from adacm2_jax.serving.operations import Ask, CancelledError, Said

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Writing:
    """An answer in a row of the table. It holds no session: that one may go to disk meanwhile."""

    ask: Ask
    reply: Reply
    prompt_tokens: int
    ids: list[int] = dataclasses.field(default_factory=list)
    said: str = ""


class Answers:
    """A table of answers that are being written.

    Args:
      model: that writes.
      rows: answers at a time.
      watch: told of what happens; see ``metrics.py``.
    """

    def __init__(self, model: SessionModel, rows: int, watch: Callable[[str, float], None]):
        self._model, self._count, self._watch = model, rows, watch
        self._writer = steps.any_policy(model.config)
        self._options = dataclasses.replace(
            model.generation,
            num_beams=1,
            num_return=1,
            temperature=0.0,
            top_p=1.0,
            eos_ids=(model.processor.eos_id,),
            pad_id=model.processor.pad_id,
        )
        self._width = model.config.max_text_len
        self.clear()

    def clear(self) -> None:
        """An empty table."""
        self._writing: list[_Writing | None] = [None] * self._count
        self._rows = continuous.empty(self._writer, self._count, self._width, self._options)

    @property
    def full(self) -> bool:
        """Whether no row is free."""
        return None not in self._writing

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return self._options.max_new_tokens

    def fail(self, error: BaseException) -> None:
        """All that are being written end so."""
        for writing in self._writing:
            if writing:
                writing.ask.fail(error)
        self._writing = [None] * self._count

    def begin(self, session: Session, look: Look, ask: Ask) -> None:
        """Reads a prompt into a free row, and writes the first token.

        Args:
          session: that is asked.
          look: what it has to say.
          ask: whose answer it is to be.
        """
        wish = ask.wish
        # What it rests on is told now: the stream goes on.
        reply = session.reply(look, [Answer("", 0.0)], wish.moments)
        row, written = continuous.begin(
            self._writer,
            self._model.params,
            look.queries,
            look.asked,
            wish.temperature,
            wish.top_p,
            jax.random.key(wish.seed),
            self._width,
            self._options,
        )
        token, ended, score = jax.device_get((written.token, written.ended, written.score))
        place = self._writing.index(None)
        try:
            self._rows = continuous.put(self._rows, place, row)
        except Exception as error:  # the table was given away for a new one
            self.fail(error)
            self.clear()
            raise
        prompt = self._model.config.qformer.num_queries + int(np.sum(look.asked.llm_mask))
        self._writing[place] = _Writing(ask, reply, prompt)
        self._take(place, int(token), bool(ended), float(score))

    def write(self) -> bool:
        """One more token of every answer; whether there was any."""
        if not any(self._writing):
            return False
        try:
            self._rows, written = continuous.advance(
                self._writer, self._model.params, self._rows, self._options
            )
            token, ended, score = jax.device_get((written.token, written.ended, written.score))
        except Exception as error:
            _log.exception("answers could not be written")
            self.fail(error)
            self.clear()
            return True
        for place, writing in enumerate(self._writing):
            if writing:
                self._take(place, int(token[place]), bool(ended[place]), float(score[place]))
        return True

    def _take(self, place: int, token: int, ended: bool, score: float) -> None:
        """A row has a new token; whatever comes of it ends this answer alone."""
        writing = self._writing[place]
        assert writing is not None
        try:
            ends = self._say(writing, token, ended, score)
        except Exception as error:  # of who is told: a loop that is closed, say
            writing.ask.fail(error)
            ends = True
        if ends:
            self._writing[place] = None

    def _say(self, writing: _Writing, token: int, ended: bool, score: float) -> bool:
        """Tells what the new token makes of an answer; whether that is its end."""
        ask, wish = writing.ask, writing.ask.wish
        if ask.first is None:
            ask.first = time.monotonic()
            self._watch("first_token_seconds", ask.first - ask.began)
        if ask.cancelled:
            raise CancelledError("the request has been given up")
        writing.ids.append(token)
        self._watch("tokens", 1)
        finish = ""
        if token == self._model.processor.eos_id:
            finish = "stop"
        elif ended or len(writing.ids) >= wish.max_tokens:
            finish = "length"
        text = self._model.processor.decode(np.array(writing.ids))
        cut = min((at for stop in wish.stop if (at := text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            text, finish = text[:cut].rstrip(), "stop"
        # Half a character, or what may yet be the beginning of a stop, is not said.
        held = "" if finish else text
        if finish or not (text.endswith("�") or any(_overlaps(held, stop) for stop in wish.stop)):
            if text.startswith(writing.said) and len(text) > len(writing.said):
                ask.on_text(text[len(writing.said) :])
                writing.said = text
        if finish:
            answer = Answer(text, score)
            reply = dataclasses.replace(writing.reply, answer=text, score=score, n_best=(answer,))
            ask.finish(Said(reply, finish, writing.prompt_tokens, len(writing.ids)))
        return bool(finish)


def _overlaps(text: str, stop: str) -> bool:
    """Whether the end of a text may be the beginning of another."""
    most = min(len(stop) - 1, len(text))
    return any(text.endswith(stop[:count]) for count in range(1, most + 1))
