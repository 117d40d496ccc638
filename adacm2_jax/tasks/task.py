"""What a benchmark is: how its annotation is read, how it is asked, and how answers are scored.

One file beside this one a benchmark; it ends with ``TASKS``. A task knows neither videos nor
models: it reads the published annotation and yields :class:`Item`. ``data.sources`` joins items
with the videos of a directory, ``data/<name>/builder.py`` writes them as records,
``adacm2_jax.scoring`` turns predictions into the benchmark's figures.
"""

import dataclasses
import importlib
import logging
import math
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adacm2_jax.errors import DataError, UserError, check_text, printable, reason


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a benchmark about one video.

    Attributes:
      id: names it in predictions; unique in its split.
      video: the video's name in the annotation, without directory and suffix.
      question: what stands for ``{question}`` in the task's prompt.
      answers: the right ones: one, several (captions of one video), or none where they are not
        published.
      choices: the texts among which one is right; empty where the answer is free.
      start, end: the part of the video that counts, seconds; None for the video's own.
      at: when the question is asked, seconds: it may be answered by what came before alone; None
        for the video's end.
      category: results are reported by it, too.
    """

    id: str
    video: str
    question: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    start: float | None = None
    end: float | None = None
    at: float | None = None
    category: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark, or one of several that share their videos.

    Attributes:
      name: such as ``lvu_genre``.
      read: (directory of the annotation, split) → its items, in the annotation's order. Raises
        ``DataError`` for a file that is missing or of another form.
      splits: that the annotation has.
      files: of the annotation, as published, relative to its directory; for messages and docs.
      prompt: what both language networks are asked; its only field is ``{question}``.
      metrics: names in ``adacm2_jax.scoring.METRICS``; the first is the one that is reported.
      by: ``generate``, or ``likelihood``: the most probable of the choices is the answer.
      generation: fields of ``GenerationConfig`` that the protocol prescribes.
    """

    name: str
    read: Callable[[Path, str], Sequence[Item]]
    splits: tuple[str, ...]
    files: tuple[str, ...]
    prompt: str = "{question}"
    metrics: tuple[str, ...] = ("top1",)
    by: str = "generate"
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)


def find(name: str) -> Task:
    """The task of that name.

    Raises:
      UserError: if there is none; tells those there are.
    """
    known = every()
    if name not in known:
        raise UserError(f"task {name!r} is unknown; there are {', '.join(sorted(known))}")
    return known[name]


def every() -> dict[str, Task]:
    """All tasks by name, of all files beside this one."""
    package = importlib.import_module(__package__)
    tasks: dict[str, Task] = {}
    for name in sorted(found.name for found in pkgutil.iter_modules(package.__path__)):
        try:
            module = importlib.import_module(f"{__package__}.{name}")
        except Exception as error:  # a file that somebody is writing stops no other task
            logging.warning(
                "%s.%s is left out, its tasks are unknown: %s", __package__, name, reason(error)
            )
            continue
        tasks |= {task.name: task for task in getattr(module, "TASKS", ())}
    return tasks


def items_of(task: Task, annotations: Path, split: str) -> list[Item]:
    """A split of a task's annotation, checked.

    Raises:
      DataError: for a split that the task does not have, an annotation that cannot be read or is
        empty, or an item that cannot be: an id twice, a time that is none, an answer that is not
        among the choices, text that is no Unicode.
    """
    if split not in task.splits:
        raise DataError(f"task {task.name} has no split {split!r}; it has {', '.join(task.splits)}")
    try:
        items = list(task.read(annotations, split))
    except (TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{printable(str(annotations))}: the {split} annotation of {task.name} has another "
            f"form than is read ({type(error).__name__}: {printable(str(error)[:100])}); "
            "data/README.md says which"
        ) from error
    if not items:
        raise DataError(f"{printable(str(annotations))}: nothing is asked in {split}")
    seen: set[str] = set()
    for item in items:
        _check(item, f"task {task.name}, {split}: id {printable(item.id)}")
        if item.id in seen:
            raise DataError(f"task {task.name}, {split}: id {printable(item.id)} is there twice")
        seen.add(item.id)
    return items


def _check(item: Item, where: str) -> None:
    for text in (item.id, item.video, item.question, *item.answers, *item.choices):
        try:
            check_text(text, where)
        except UserError as error:
            raise DataError(str(error)) from None
    for name in ("start", "end", "at"):
        value = getattr(item, name)
        if value is not None and not 0 <= value < math.inf:
            raise DataError(f"{where}: {name} = {value!r} is no time in a video")
    if item.start is not None and item.end is not None and item.end <= item.start:
        raise DataError(f"{where}: ends at {item.end:g} s, but begins at {item.start:g} s")
    if item.choices and item.answers and not set(item.answers) & set(item.choices):
        raise DataError(f"{where}: the answer {item.answers[0]!r:.60} is none of its choices")
