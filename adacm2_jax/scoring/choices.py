"""Which of the given choices a free text names."""

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "123456789"


def chosen(text: str, choices: Sequence[str], labels: str = LETTERS) -> int | None:
    """The place of the choice that a text names; None if it names none, or several alike.

    In this order: the text is a choice; it is a label, or begins with one (``B``, ``(B)``, ``B.``);
    it says that the answer is one; it has one in brackets; one alone of the choices is in it; it
    has a label as a word of its own.

    Args:
      text: as a model wrote it.
      choices: without their labels.
      labels: of the choices, in order.
    """
    text, labels = text.strip(), labels[: len(choices)]
    plain = [_plain(choice) for choice in choices]
    if plain.count(_plain(text)) == 1:
        return plain.index(_plain(text))
    for pattern in _patterns(labels):
        if found := re.search(pattern, text):
            return labels.index(next(group for group in found.groups() if group).upper())
    within = [
        place
        for place, choice in enumerate(plain)
        if choice and re.search(rf"\b{re.escape(choice)}\b", _plain(text))
    ]
    if len(within) == 1:
        return within[0]
    # "A" and "I" are words, too: as such a letter is followed by another word.
    words = re.findall(rf"\b([{labels}])\b(?!\s+[a-z])", text) if labels else []
    return labels.index(words[0]) if words else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _patterns(labels: str) -> list[str]:
    if not labels:
        return []
    either = labels + labels.lower()
    return [
        rf"^\(?([{either}])(?:[).:,\]]|$)",
        rf"(?i:\b(?:answer|option|choice)\b)(?i:\s+is)?[\s:]*\(?([{labels}])\b(?!\s+[a-z])",
        rf"\(([{either}])\)",
    ]
