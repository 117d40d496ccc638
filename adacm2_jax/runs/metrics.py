"""Numbers of a run on disk."""

import contextlib
import json
import os
import pathlib
import time

from adacm2_jax.distributed import is_main


class MetricWriter:
    """Appends scalars to ``metrics.jsonl`` and, where tensorboardX is installed, to event files.
    Of several processes the first alone writes.

    Args:
      workdir: where both go.
      step: the step that a run goes on from: rows of later steps and evaluations (``eval/…``) of
        that step, which will be computed again, are removed.
    """

    def __init__(self, workdir: str | os.PathLike, step: int = 0):
        self._file = self._events = None
        if not is_main():
            return
        path = pathlib.Path(workdir) / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        beside = path.with_suffix(".partial")
        beside.write_text("".join(f"{row}\n" for row in rows if _stays(row, step)))
        beside.replace(path)
        self._file = path.open("a")
        with contextlib.suppress(ImportError):
            self._events = _Events(workdir, step)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """One row: ``{"step": …, name: value, …}``."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step} | scalars) + "\n")
        self._file.flush()
        if self._events:
            self._events.write(step, scalars)

    def close(self) -> None:
        with contextlib.ExitStack() as both:
            if self._events:
                both.callback(self._events.close)
            if self._file:
                self._file.close()


class _Events:
    """A TensorBoard event file, written as it goes.

    ``SummaryWriter`` writes in a thread: when a full disk has ended that, a program waits for ever
    in its queue.
    """

    def __init__(self, workdir: str | os.PathLike, step: int):
        from tensorboardX import proto, summary
        from tensorboardX.event_file_writer import EventsWriter

        self._event, self._scalar = proto.event_pb2.Event, summary.scalar
        self._writer = EventsWriter(os.path.join(workdir, "events"))
        if step:  # hides later steps of the process before, which will be computed again
            start = proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START)
            self._write(step + 1, session_log=start)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._write(step, summary=self._scalar(name, value))
        self._writer.flush()

    def _write(self, step: int, **content) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        self._writer.close()


def _stays(row: str, step: int) -> bool:
    try:
        values = json.loads(row)
    except ValueError:
        return False  # a row that a killed process left half-written
    evaluation = any(name.startswith("eval/") for name in values)
    return values["step"] < step + (not evaluation)
