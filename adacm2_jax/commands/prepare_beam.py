"""``adacm2 prepare`` as an Apache Beam pipeline: the runner says who computes which shard.

Workers import this module and what it imports, so the repository must be on their path; the source,
``init_from`` and the output must be at the same paths for all of them.
"""

import re
import threading
from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import create_runner

from adacm2_jax.commands.prepare_worker import Job, worker_of
from adacm2_jax.errors import UserError

#: A process holds one ViT and one set of decoded clips, however many threads its runner has.
_ONE_AT_A_TIME = threading.Lock()
RUNNERS = {"direct": "DirectRunner", "dataflow": "DataflowRunner", "flink": "FlinkRunner"}


class WriteShard(beam.DoFn):
    """Shard → its number, once it is on disk; one that is there already is left alone."""

    def __init__(self, job: Job, manifest: dict):
        self._job, self._manifest = job, manifest

    def process(self, shard: int) -> Iterator[int]:
        with _ONE_AT_A_TIME:
            worker_of(self._job).write(self._manifest, shard)
        yield shard


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


def run(job: Job, manifest: dict, shards: Sequence[int], options: PipelineOptions) -> None:
    """Computes shards and waits for them.

    Args:
      job, manifest: of ``adacm2 prepare``.
      shards: that are missing.
      options: of :func:`options_of`.

    Raises:
      UserError: what a worker says that its reader can mend.
    """
    try:
        with beam.Pipeline(options=options) as pipeline:
            (
                pipeline
                | "Shards" >> beam.Create(list(shards))
                | "Spread" >> beam.Reshuffle()
                | "Write" >> beam.ParDo(WriteShard(job, manifest))
            )
    except RuntimeError as error:  # a worker's, as text
        if found := re.findall(r"errors\.(?:Data|User)Error: (.*)", str(error)):
            raise UserError(found[-1]) from error
        raise
