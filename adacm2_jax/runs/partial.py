"""What an evaluation leaves while it runs, so that it goes on where it was killed.

``predictions.partial.jsonl`` holds the lines. Beside it, ``predictions.progress.jsonl`` says of
what they are (the first line), and how far they go: one line a batch, written when the batch's
predictions are on disk. A batch of which that line is missing is answered again, the same rows in
the same shapes, so the end is the same to the last bit.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from adacm2_jax import __version__
from adacm2_jax.distributed import is_main
from adacm2_jax.files import keep_earlier
from adacm2_jax.runs.experiment import Experiment, to_dict

#: Fields of an experiment that change no prediction.
_IDLE = {
    "data": ("workers", "cache", "cache_dir", "data_dir", "features", "features_local", "jitter"),
    "eval": ("workers", "every"),
}
_UNUSED = ("train", "optim", "checkpoint", "init_missing", "init_from", "tokenizers")


def describe(
    experiment: Experiment, parameters: str, source: Sequence[Any], count: int, task: str
) -> dict[str, str]:
    """What predictions are of: they go on where all of it is the same.

    Args:
      experiment: that is evaluated.
      parameters: a digest of them.
      source: of the examples.
      count: how many of them are answered.
      task: its name; empty without one.
    """
    values = {name: part for name, part in to_dict(experiment).items() if name not in _UNUSED}
    for section, names in _IDLE.items():
        values[section] = {k: v for k, v in values[section].items() if k not in names}
    device = jax.devices()[0].device_kind
    return {
        "experiment": digest(values),
        "parameters": parameters,
        "split": digest([count, _what(source, count)]),
        "task": task,
        "versions": f"adacm2-jax {__version__}, jax {jax.__version__}, {device}",
    }


def _what(source: Sequence[Any], count: int) -> Any:
    if hasattr(source, "fingerprint"):
        return source.fingerprint()
    shown = ("id", "question", "answer", "answers", "choices", "start", "end", "at", "reading")
    return [[str(getattr(source[i], name)) for name in shown] for i in range(count)]


def digest(value: Any) -> str:
    """A short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class PartialPredictions:
    """Predictions on their way; only process 0 of several writes.

    Args:
      directory: of the results, which the caller holds.
      header: of :func:`describe`. Predictions of something else that lie there get a number.

    Attributes:
      lines: that are there.
      failed: videos that could not be read, see ``metrics.json``.
      done: how many examples of the split are behind them.
      batches: in how many batches.
      seconds: that took.
      set_aside: what of the header differed; empty if nothing did.
    """

    def __init__(self, directory: pathlib.Path, header: dict[str, str]):
        self._path = directory / "predictions.partial.jsonl"
        self._progress = directory / "predictions.progress.jsonl"
        self._whole = directory / "predictions.jsonl"
        self.lines: list[dict] = []
        self.failed: list[dict] = []
        self.done = self.batches = 0
        self.seconds = 0.0
        self.set_aside: list[str] = []
        state = _shared(json.dumps(self._restore(header)) if is_main() else "")
        for name, value in json.loads(state).items():
            setattr(self, name, value)

    def add(self, lines: Sequence[dict], failed: Sequence[dict], done: int, seconds: float) -> None:
        """Writes the lines of a batch, then that they are written.

        Args:
          lines: of the batch.
          failed: all that could not be read so far.
          done: examples of the split that are done.
          seconds: that all of it took so far.
        """
        self.lines.extend(lines)
        self.failed, self.done, self.seconds = list(failed), done, seconds
        self.batches += 1
        if is_main():
            size = _append(self._path, lines)
            record = {"done": done, "batches": self.batches, "bytes": size}
            _append(self._progress, [record | {"failed": self.failed, "seconds": seconds}])

    def finish(self) -> None:
        """Gives the predictions their name; earlier ones have got a number."""
        if is_main():
            self._path.touch()  # where there was nothing to answer
            self._path.replace(self._whole)
            self._progress.unlink(missing_ok=True)

    def _restore(self, header: dict[str, str]) -> dict[str, Any]:
        """Attributes from what is on disk, which is cut to it."""
        stored, records = _read(self._progress)
        if stored == header and records and not self._path.exists():
            # Killed when the name had been given: it is taken back.
            if self._whole.exists() and self._whole.stat().st_size == records[-1]["bytes"]:
                self._whole.replace(self._path)
        size = self._path.stat().st_size if self._path.exists() else 0
        records = [record for record in records if record["bytes"] <= size]
        if stored != header or not records:
            aside = sorted(name for name in header if (stored or {}).get(name) != header[name])
            if size:
                keep_earlier(self._path, self._progress)
            else:
                self._path.unlink(missing_ok=True)
                self._progress.unlink(missing_ok=True)
            _append(self._progress, [header])
            return {"set_aside": aside if size else []}
        last = records[-1]
        os.truncate(self._path, last["bytes"])
        beside = self._progress.with_name(f".{self._progress.name}")
        beside.unlink(missing_ok=True)
        _append(beside, [header, *records])
        beside.replace(self._progress)
        text = self._path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        return {"lines": lines} | {
            name: last[name] for name in ("done", "batches", "failed", "seconds")
        }


def _append(path: pathlib.Path, values: Sequence[dict]) -> int:
    """Adds lines of JSON, which are on disk then; returns the file's size."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _read(path: pathlib.Path) -> tuple[dict | None, list[dict]]:
    """The header and the records of a progress file, up to the first that is torn."""
    values: list[dict] = []
    if path.exists():
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                values.append(json.loads(line))
            except ValueError:
                break
    return (values[0] if values else None), values[1:]


def _shared(text: str) -> str:
    """The text of process 0, in all processes."""
    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.zeros(size, np.uint8)
    padded[: min(size, len(content))] = content[:size]
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode()
