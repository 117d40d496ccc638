"""``python -m data.benchmark.build`` as an Apache Beam pipeline: the runner says who writes which
shard.

Workers import this module and what it imports, so the repository must be on their path; the videos
and the data set must be at the same paths for all of them.
"""

from collections.abc import Iterator, Sequence

import apache_beam as beam

from data.beam_runner import options_of, run_all
from data.benchmark.build import Job, write_shard


class WriteShard(beam.DoFn):
    """A shard → its name, once it is on disk."""

    def process(self, job: Job) -> Iterator[str]:
        write_shard(job)
        yield job.path.name


def write(jobs: Sequence[Job], runner: str, options: Sequence[str]) -> None:
    """Writes shards and waits for them.

    Args:
      jobs: that are left.
      runner, options: see ``beam_runner.options_of``.

    Raises:
      UserError: if Beam has no such runner, or what a worker says that its reader can mend.
    """
    run_all(jobs, WriteShard(), options_of(runner, options))
