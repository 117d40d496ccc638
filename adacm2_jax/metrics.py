"""Scores of predictions, and numbers of a run on disk."""

import json
import math
import os
import pathlib


def exact_match(prediction: str, answer: str) -> bool:
    """Equal after lower-casing and trimming white space."""
    return prediction.strip().lower() == answer.strip().lower()


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927), by default at 95 %.

    Unlike the normal approximation it stays inside [0, 1] and is not empty at 0 or 100 %.
    """
    if not total:
        return 0.0, 1.0
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (centre - spread) / scale, (centre + spread) / scale


class MetricWriter:
    """Appends scalars to ``metrics.jsonl`` and, where tensorboardX is installed, to event files.

    Args:
      workdir: where both go.
      step: the step that a run goes on from: rows of later steps and evaluations (``eval/…``) of
        that step, which will be computed again, are removed.
    """

    def __init__(self, workdir: str | os.PathLike, step: int = 0):
        path = pathlib.Path(workdir) / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        beside = path.with_suffix(".partial")
        beside.write_text("".join(f"{row}\n" for row in rows if _stays(row, step)))
        beside.replace(path)
        self._file = path.open("a")
        try:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(os.fspath(workdir), purge_step=step + 1 if step else None)
        except ImportError:
            self._events = None

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """One row: ``{"step": …, name: value, …}``."""
        self._file.write(json.dumps({"step": step} | scalars) + "\n")
        self._file.flush()
        if self._events:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._events:
            self._events.close()


def _stays(row: str, step: int) -> bool:
    try:
        values = json.loads(row)
    except ValueError:
        return False  # a row that a killed process left half-written
    evaluation = any(name.startswith("eval/") for name in values)
    return values["step"] < step + (not evaluation)
