"""Questions with given choices: how they are put, and what several benchmarks share.

Each such benchmark is two tasks. ``NAME`` shows the choices with letters, and a letter is to be
generated. ``NAME_ranked`` shows none: the choice that is the most probable answer is the answer.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from adacm2_jax.errors import DataError, printable
from adacm2_jax.scoring.choices import DIGITS, LETTERS
from adacm2_jax.tasks.task import Item, Task

#: How a letter, a number or Yes is generated.
BRIEFLY = {"num_beams": 1, "max_new_tokens": 8}

_ANSWER_WITH = {LETTERS: "letter", DIGITS: "number"}


def ask(question: str, choices: Sequence[str], labels: str = LETTERS) -> str:
    """A question with its choices, a line each: ``(A) a cat``.

    Args:
      question: alone.
      choices: without labels of their own; see :func:`without_labels`.
      labels: of one character each: :data:`LETTERS`, :data:`DIGITS`, or any others.

    Raises:
      DataError: for more choices than labels.
    """
    if len(choices) > len(labels):
        raise DataError(f"{len(choices)} choices, but there are labels for {len(labels)}")
    lines = [f"({label}) {choice}" for label, choice in zip(labels, choices, strict=False)]
    ending = f"Answer with the {_ANSWER_WITH.get(labels, 'label')} of the right option:"
    return "\n".join([f"Question: {question}", "Options:", *lines, ending])


def without_labels(choices: Sequence[str]) -> tuple[str, ...]:
    """Choices without the ``A.``, ``(A)`` or ``A)`` that each begins with, if all do, in order."""
    texts = [choice.strip() for choice in choices]
    found = [
        re.match(rf"(?:\({label}\)|{label}[.:)])\s*", text)
        for label, text in zip(LETTERS, texts, strict=False)
    ]
    if len(found) == len(texts) and all(found):
        texts = [text[each.end() :] for text, each in zip(texts, found, strict=True) if each]
    return tuple(texts)


def right_choice(answer: str | int, choices: Sequence[str], where: str) -> str:
    """The text of the right choice, which an annotation names by letter, index or text.

    Raises:
      DataError: naming the entry, if it is none of them.
    """
    if isinstance(answer, int) and 0 <= answer < len(choices):
        return choices[answer]
    if isinstance(answer, str):
        text = answer.strip()
        if text in choices:
            return text
        label = text.strip("().")
        if len(label) == 1 and label in LETTERS[: len(choices)]:
            return choices[LETTERS.index(label)]
    raise DataError(
        f"{printable(where)}: the answer {answer!r:.60} is none of its {len(choices)} choices"
    )


def both_ways(
    name: str,
    read: Callable[[Path, str], Sequence[Item]],
    splits: tuple[str, ...],
    files: tuple[str, ...],
) -> tuple[Task, Task]:
    """The two tasks of a benchmark, see above; ``read`` gives questions without their choices."""

    def lettered(directory: Path, split: str) -> Sequence[Item]:
        return [
            dataclasses.replace(item, question=ask(item.question, item.choices))
            for item in read(directory, split)
        ]

    make = functools.partial(Task, splits=splits, files=files)
    return (
        make(name, lettered, metrics=("multiple_choice",), generation=BRIEFLY),
        make(
            f"{name}_ranked",
            read,
            prompt="Question: {question} Short answer:",
            metrics=("ranked", "ranked_per_token"),
            by="likelihood",
        ),
    )
