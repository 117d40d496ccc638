"""Reading published annotation files; what is wrong with one is said with its name."""

import json
from pathlib import Path
from typing import Any

from adacm2_jax.errors import DataError, printable


def read_json(directory: Path, name: str, kind: type) -> Any:
    """A JSON file of an annotation.

    Args:
      directory: of the annotation.
      name: of the file in it.
      kind: ``dict`` or ``list``, what it holds.

    Raises:
      DataError: if it is missing, no JSON, or holds something else.
    """
    path = directory / name
    where = printable(str(path))
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(
            f"{where}: no such file: data/README.md says where the annotation is had"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no readable JSON file: {error}") from None
    if not isinstance(found, kind):
        raise DataError(
            f"{where}: holds a {type(found).__name__}, not a {kind.__name__}: another version of "
            "the annotation? data/README.md says which is read"
        )
    return found


def field(entry: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field of an entry.

    Args:
      entry: of an annotation.
      name: of the field.
      kind: of its value.
      where: names the entry in messages.

    Raises:
      DataError: if it is not there, or of another kind.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{printable(where)}: field {name!r} is {value!r:.60}, not what is read")
    return value
