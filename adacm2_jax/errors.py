"""The errors and warnings that are meant for the person at the keyboard."""

import logging
import re
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any


class UserError(ValueError):
    """Something in a configuration, a checkpoint or an input that its owner can put right.

    The message is one line that names the thing, its value and the remedy; the scripts print it
    without a traceback and exit with ``status``.
    """

    status = 2


class DataError(UserError):
    """A video, an annotation or a data set that cannot be used.

    Whatever one video does ends as this error, so that a run can list it and go on with the rest.
    """


class LostProcessError(UserError):
    """One of several processes is missing or gone. The same command may do another time, so the
    status is ``EX_TEMPFAIL``: what restarts jobs can tell it from a mistake.
    """

    status = 75


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, the last first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def check_text(text: str, name: str) -> str:
    """Returns a text that can be written as UTF-8.

    A command line in another encoding than the locale's, or half a surrogate pair in JSON, gives
    one that cannot.

    Raises:
      UserError: naming it and the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is no text at character {error.start + 1} ({text[:40]!a}): write it in "
            "UTF-8, or set LC_ALL=C.UTF-8"
        ) from None
    return text


def check_kind(value: Any, kinds: type | tuple[type, ...], name: str, accepted: str) -> Any:
    """Returns a value of one of ``kinds``; true and false are no numbers.

    Raises:
      UserError: naming it, what it is, and what is ``accepted``.
    """
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"{name} is {printable(repr(value)[:60])}; give {accepted}")
    return value


def reason(error: BaseException, limit: int = 120) -> str:
    """What an error of a library says, for one line of ours: its first line, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error)).strip()
    return text.split("\n")[0][:limit] or type(error).__name__


def printable(text: str) -> str:
    """Text from outside, such as a file's name, as it may stand in a message of one line.

    Control characters (line ends, and the escapes that colour a terminal or move its cursor) and
    halves of surrogate pairs become Python's escapes.
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _UNSEEN else char
        for char in text
    )


#: Categories of control characters and of halves of surrogate pairs.
_UNSEEN = ("Cc", "Cs")


class _Lines(logging.Handler):
    """Writes what is logged as our own messages are written, and nothing twice."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record, unless one like it was written."""
        line = f"{record.levelname.lower()}: {self.format(record)}"
        if line not in self._said:
            self._said.add(line)
            print(line, file=sys.stderr, flush=True)


def show_warnings() -> None:
    """Logged warnings become lines on stderr, each once: an epoch meets the same videos again.

    Of what libraries log through absl (Orbax, Grain), errors alone are shown: nothing else that
    they report is the user's to mend.
    """
    root = logging.getLogger()
    for handler in root.handlers[:]:
        stream = getattr(handler, "stream", None)  # of who called logging.basicConfig
        if isinstance(handler, _Lines) or stream in (sys.stdout, sys.stderr):
            root.removeHandler(handler)
    root.addHandler(_Lines())
    logging.getLogger("absl").setLevel(logging.ERROR)
