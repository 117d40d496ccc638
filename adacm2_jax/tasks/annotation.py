"""Reading published annotation files; what is wrong with one is said with its name."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adacm2_jax.errors import DataError, UserError, printable


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
    if path.exists() and not path.is_file():
        raise DataError(f"{where}: is no file; name the directory that holds the annotation")
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no readable JSON file: {error}") from None
    if not isinstance(found, kind):
        raise DataError(
            f"{where}: holds a {type(found).__name__}, not a {kind.__name__}: another version of "
            "the annotation? data/README.md says which is read"
        )
    return found


def read_rows(directory: Path, names: Sequence[str]) -> tuple[str, list[Any]]:
    """The entries of an annotation that is published as JSON, JSON lines or Parquet.

    Args:
      directory: of the annotation.
      names: of files, each with its suffix; the first that is there is read.

    Returns:
      Its name, and what it holds.

    Raises:
      DataError: if there is none, or it cannot be read.
      UserError: for a Parquet file without pyarrow.
    """
    for name in names:
        path = directory / name
        if not path.exists():
            continue
        if name.endswith(".parquet"):
            return name, _read_parquet(path)
        if name.endswith(".jsonl"):
            return name, _read_lines(path)
        return name, read_json(directory, name, list)
    raise _missing(directory / " or ".join(names))


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


def texts(entry: Any, name: str, where: str) -> list[str]:
    """A field that is a list of texts.

    Raises:
      DataError: if it is something else.
    """
    values = field(entry, name, list, where)
    for value in values:
        if not isinstance(value, str):
            raise DataError(f"{printable(where)}: field {name!r} holds {value!r:.60}, no text")
    return values


def seconds(text: str, where: str) -> float:
    """The seconds of a time such as ``00:01:52`` or ``01:52``.

    Raises:
      DataError: naming the entry, if it is no time.
    """
    parts = text.strip().split(":")
    try:
        if not 1 <= len(parts) <= 3:
            raise ValueError
        values = [float(part) for part in parts]
    except ValueError:
        raise DataError(f"{printable(where)}: {text!r:.40} is no time such as 00:01:52") from None
    return sum(value * 60**place for place, value in enumerate(reversed(values)))


def _read_lines(path: Path) -> list[Any]:
    where = printable(str(path))
    rows = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: is no readable file: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: line {number} is not JSON: {error}") from None
    return rows


def _read_parquet(path: Path) -> list[Any]:
    where = printable(str(path))
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(
            f"{where}: Parquet needs pyarrow: pip install pyarrow, or write the file as JSON lines"
        ) from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # of pyarrow all are these
        raise DataError(f"{where}: is no readable Parquet file: {error}") from None


def _missing(path: Path) -> DataError:
    return DataError(
        f"{printable(str(path))}: no such file: data/README.md says where the annotation is had"
    )
