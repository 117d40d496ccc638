"""``adacm2 prepare`` as an Apache Beam pipeline: the runner says who computes which shard.

Workers import this module and what it imports, so the repository must be on their path; the source,
``init_from`` and the output must be at the same paths for all of them.
"""

import threading
from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from adacm2_jax.commands.prepare_worker import Job, worker_of
from data.beam_runner import run_all

#: A process holds one ViT and one set of decoded clips, however many threads its runner has.
_ONE_AT_A_TIME = threading.Lock()


class WriteShard(beam.DoFn):
    """Shard → its number, once it is on disk; one that is there already is left alone."""

    def __init__(self, job: Job, manifest: dict):
        self._job, self._manifest = job, manifest

    def process(self, shard: int) -> Iterator[int]:
        with _ONE_AT_A_TIME:
            worker_of(self._job).write(self._manifest, shard)
        yield shard


def run(job: Job, manifest: dict, shards: Sequence[int], options: PipelineOptions) -> None:
    """Computes shards and waits for them.

    Args:
      job, manifest: of ``adacm2 prepare``.
      shards: that are missing.
      options: of ``beam_runner.options_of``.

    Raises:
      UserError: what a worker says that its reader can mend.
    """
    run_all(shards, WriteShard(job, manifest), options)
