"""Shards written by Apache Beam: its options, and a pipeline that hands out the shards.

Imported only where Beam is installed.
"""

import re
from collections.abc import Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import create_runner

from adacm2_jax.errors import UserError

RUNNERS = {"direct": "DirectRunner", "dataflow": "DataflowRunner", "flink": "FlinkRunner"}


def options_of(runner: str, options: Sequence[str]) -> PipelineOptions:
    """Options of Beam.

    Args:
      runner: of :data:`RUNNERS`, or a name that Beam knows.
      options: of Beam, such as ``project=…``.

    Raises:
      UserError: if Beam has no such runner.
    """
    name = RUNNERS.get(runner, runner)
    try:
        create_runner(name)
    except (ValueError, ImportError) as error:
        reason = str(error).split(";")[0]
        raise UserError(
            f"--runner={runner}: {reason}; use local, {', '.join(RUNNERS)} or another that Apache "
            "Beam has"
        ) from None
    return PipelineOptions([f"--{option}" for option in options] + [f"--runner={name}"])


def run_all(shards: Sequence[Any], write: beam.DoFn, options: PipelineOptions) -> None:
    """Gives each shard to ``write`` on some worker, and waits for them.

    Raises:
      UserError: what a worker says that its reader can mend.
    """
    try:
        with beam.Pipeline(options=options) as pipeline:
            (
                pipeline
                | "Shards" >> beam.Create(list(shards))
                | "Spread" >> beam.Reshuffle()
                | "Write" >> beam.ParDo(write)
            )
    except RuntimeError as error:  # a worker's, as text
        if found := re.findall(r"errors\.(?:Data|User)Error: (.*)", str(error)):
            raise UserError(found[-1]) from error
        raise
