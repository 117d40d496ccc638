"""The user's own videos: one JSON object a line, checked before any time is spent."""

from __future__ import annotations

import difflib
import hashlib
import json
import operator
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, SupportsIndex

import numpy as np

from adacm2_jax.errors import DataError, UserError, check_text, printable

_FIELDS = ("video", "question", "answer", "start", "end", "id")
_OF_BENCHMARKS = ("answers", "choices", "at", "group", "category", "reading")
_MOST_REPORTED = 5


class Drawn(Protocol):
    """A video that no file holds."""

    def frames(self, size: int) -> np.ndarray:
        """All its frames, uint8[T, size, size, 3]."""
        ...


@dataclass(frozen=True)
class Example:
    """One question about one video.

    Attributes:
        id: names the example in predictions.
        video: path of the video file, or the encoded file's bytes; or what draws its own frames.
        question: may be empty.
        answer: None where it is not known.
        start, end: the part of the video that counts, seconds; None for the video's own.
        answers: all that are right, where several are (captions); ``answer`` is the first of them.
        choices: the texts among which one is right; empty where the answer is free.
        at: when the question is asked, seconds; None for the video's end.
        group: the video's name: intervals are over videos, and examples of one video that follow
            one another are read together. Empty for ``video``.
        category: results are reported by it, too.
        reading: what is read beside the frames in place of the question, which is known with the
            last frame alone; may be empty. None: the question is known from the first frame on.
    """

    id: str
    video: str | bytes | Drawn
    question: str
    answer: str | None
    start: float | None
    end: float | None
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    at: float | None = None
    group: str = ""
    category: str = ""
    reading: str | None = None


class JsonlSource:
    """Examples from a JSON Lines file, by random access (fits `grain.RandomAccessDataSource`).

    A line is an object with `video` (a path, absolute or relative to this file) and `question`;
    `answer` (needed for training and scoring), `start`, `end` (seconds) and `id` (by default the
    line number) are optional, as are what benchmarks have: `answers` instead of `answer`,
    `choices`, `at` (seconds), `group` and `category`, and `reading` for a question that is known
    late. Blank lines and a byte order mark are passed over.

    Args:
        path: the file, UTF-8.
        require_answer: refuse lines without an answer.
    Raises:
        DataError: the file is missing or has no examples, or lines are wrong: the first five are
            named, each with its field and the remedy. A missing video is not an error here, see
            `missing_videos`.
    """

    def __init__(self, path: str | os.PathLike, require_answer: bool = True):
        self.path = os.fspath(path)
        self.require_answer = require_answer
        self._examples: list[Example] = []
        problems: list[str] = []
        first_line: dict[str, int] = {}
        for number, line in enumerate(_read_lines(self.path), start=1):
            if not line.strip():
                continue
            try:
                example = self._parse(line, number)
                if example.id in first_line:
                    raise DataError(
                        f"field 'id': {example.id!r} is line {first_line[example.id]}'s id already;"
                        " give each line its own"
                    )
            except DataError as problem:
                problems.append(f"line {number}: {problem}")
                continue
            first_line[example.id] = number
            self._examples.append(example)
        if problems:
            more = len(problems) - _MOST_REPORTED
            rest = f"; and {more} more wrong lines" if more > 0 else ""
            raise DataError(f"{printable(self.path)}: {'; '.join(problems[:_MOST_REPORTED])}{rest}")
        if not self._examples:
            raise DataError(
                f"{printable(self.path)}: has no examples: write one JSON object a line, "
                '{"video": "clip.mp4", "question": "…", "answer": "…"}'
            )

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: SupportsIndex) -> Example:
        return self._examples[operator.index(index)]

    def clip(self, index: int) -> tuple[str | bytes, float | None, float | None]:
        """The video of an example, and the part of it that counts."""
        example = self._examples[index]
        return example.video, example.start, example.end

    def __repr__(self) -> str:
        return f"JsonlSource({self.path!r}, require_answer={self.require_answer})"

    def missing_videos(self) -> list[str]:
        """Lists the paths of videos that are no files, each once, in the file's order."""
        paths = dict.fromkeys(example.video for example in self._examples)
        return [path for path in paths if not os.path.isfile(path)]

    def identity(self) -> str:
        """A hash of what is asked about what, in order; files may have moved with their list."""
        beside = os.path.dirname(self.path)
        lines = [
            (example.id, os.path.relpath(str(example.video), beside or "."), example.question)
            + (example.answer, example.start, example.end)
            # Nothing more where there is no more: it is what it was before these were read.
            + tuple(
                (name, value)
                for name in _OF_BENCHMARKS
                if (value := getattr(example, name)) not in (None, "", ())
                or (name == "reading" and value == "")
            )
            for example in self._examples
        ]
        return hashlib.sha256(repr(lines).encode()).hexdigest()[:16]

    def fingerprint(self) -> str:
        """Changes when the examples or their video files do: names, sizes and times."""
        files = []
        for path in sorted({str(example.video) for example in self._examples}):
            stat = os.stat(path) if os.path.exists(path) else None
            files.append((path, stat.st_size, stat.st_mtime_ns) if stat else (path,))
        return f"{self._examples} {files}"

    def _parse(self, line: str, number: int) -> Example:
        try:
            fields = json.loads(line, object_pairs_hook=_once)
        except DataError:
            raise
        except (ValueError, RecursionError) as error:
            where = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(f"is not JSON{where}; write one JSON object a line") from None
        if not isinstance(fields, dict):
            raise DataError(f"is {_kind(fields)}; write a JSON object in braces")
        known = _FIELDS + _OF_BENCHMARKS
        for field in fields:
            if field not in known:
                close = difflib.get_close_matches(field, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
                raise DataError(f"field {field!r} is unknown; {hint}")
        video = _text(fields, "video", required=True)
        if not video:
            raise DataError("field 'video': is empty; give the path of a video file")
        question = _text(fields, "question", required=True)
        answers = _texts(fields, "answers", least=1)
        answer = _text(fields, "answer", required=self.require_answer and not answers)
        if answers and answer is not None:
            raise DataError("fields 'answer' and 'answers': give one of them")
        answer = answers[0] if answers else answer
        choices = _texts(fields, "choices", least=2)
        if choices and answer is not None and not {answer, *answers} & set(choices):
            raise DataError(f"field 'choices': {answer!r:.60} is none of them; add it")
        start, end = _seconds(fields, "start"), _seconds(fields, "end")
        at = _seconds(fields, "at")
        if at is not None and at <= (start or 0.0):
            raise DataError(
                f"field 'at': {at:g} s is not after start={start or 0.0:g} s; give a later time"
            )
        if end is not None and end <= (start or 0.0):
            empty = end == (start or 0.0)
            remedy = "the part is empty, give a later one" if empty else "swap them"
            raise DataError(
                f"field 'end': {end:g} s is not after start={start or 0.0:g} s; {remedy}"
            )
        return Example(
            id=_text(fields, "id", required=False) or str(number),
            video=str(Path(self.path).parent / video),
            question=question,
            answer=answer,
            start=start,
            end=end,
            answers=answers,
            choices=choices,
            at=at,
            group=_text(fields, "group", required=False) or "",
            category=_text(fields, "category", required=False) or "",
            reading=_text(fields, "reading", required=False),
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a name that is given twice, Python would take the last silently."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"field {twice!r} is given {names.count(twice)} times; give it once")
    return fields


def _read_lines(path: str) -> list[str]:
    name = printable(path)
    try:
        # Split at newlines alone: U+2028 and its like may stand inside a JSON string.
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DataError(f"{name}: no such file: check the path") from None
    except IsADirectoryError:
        raise DataError(f"{name}: is a directory: give the JSON Lines file inside it") from None
    except PermissionError:
        raise DataError(f"{name}: may not be read: change its permissions") from None
    except OSError as error:
        raise DataError(f"{name:.80}: {error.strerror}: check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: is not UTF-8 (byte {error.start}): save it as UTF-8") from None


def _text(fields: dict[str, Any], name: str, *, required: bool) -> str | None:
    value = fields.get(name)
    if value is None:
        if required:
            raise DataError(f"field {name!r} is missing; add it")
        return None
    return _checked(value, f"field {name!r}")


def _texts(fields: dict[str, Any], name: str, least: int) -> tuple[str, ...]:
    """The texts of a list; empty where the field is not given."""
    values = fields.get(name)
    if values is None:
        return ()
    if not isinstance(values, list):
        raise DataError(f"field {name!r}: is {_kind(values)}; give a list of strings")
    texts = tuple(
        _checked(value, f"field {name!r}: item {i}") for i, value in enumerate(values, start=1)
    )
    if len(texts) < least:
        raise DataError(
            f"field {name!r}: has {len(texts)} items; give {least} or more, or leave it out"
        )
    return texts


def _checked(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: is {_kind(value)}; give a string in quotes")
    try:
        return check_text(value, where)
    except UserError as problem:
        raise DataError(str(problem)) from None


def _seconds(fields: dict[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"field {name!r}: is {_kind(value)}; give seconds as a number")
    if not 0 <= value <= sys.float_info.max:
        raise DataError(f"field {name!r}: {value!r:.40} is not a time; give seconds from 0 on")
    return float(value)


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return kinds.get(type(value), "null" if value is None else f"the number {value!r}")
