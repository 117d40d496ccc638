"""A trace of some training steps, for xprof and TensorBoard's profiler."""

import contextlib
import os
import pathlib
import sys

import jax

from adacm2_jax.distributed import is_main

#: Steps of a process before the trace: the first compiles, the second fills what is prefetched.
WARM_UP = 2


class Profile:
    """Traces ``steps`` whole steps after the first two of this process, into ``workdir/profile``.

    Of several processes the first alone writes, for its own devices and host.

    Args:
      workdir: of the run.
      steps: how many; 0 traces nothing.
    """

    def __init__(self, workdir: str | os.PathLike, steps: int):
        self._directory = pathlib.Path(workdir) / "profile"
        self._last = WARM_UP + steps if steps and is_main() else 0
        self._begun = 0
        self._tracing = False
        self._step = contextlib.ExitStack()

    def begin_step(self, step: int) -> None:
        """Says that the step before is over, with all that was computed for it, and one begins.

        Args:
          step: its number in the run.
        """
        self._step.close()
        self._begun += 1
        if self._tracing and self._begun > self._last:
            self._stop()
        if not self._tracing and WARM_UP < self._begun <= self._last:
            jax.profiler.start_trace(self._directory)
            self._tracing = True
        if self._tracing:
            self._step.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step))

    def close(self) -> None:
        """Writes what there is of a trace; says so if there is none."""
        self._step.close()
        if self._tracing:
            self._stop()
        elif self._begun <= WARM_UP < self._last:
            print(
                f"warning: no profile, for it begins after {WARM_UP} steps of a process, and this "
                f"one took {self._begun}",
                file=sys.stderr,
            )

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False
        print(f"profile written to {self._directory}", file=sys.stderr, flush=True)
