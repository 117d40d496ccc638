"""Shards of a feature cache, computed: the clips decoded, their frames through the ViT, written."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from adacm2_jax.distributed import main_first
from adacm2_jax.inference.encoder import Encoder, describe_vision
from adacm2_jax.models.params import abstract_params, split_params
from adacm2_jax.runs import experiment as experiments
from adacm2_jax.runs.experiment import Experiment
from adacm2_jax.runs.load import vision_params
from adacm2_jax.sharding import make_mesh
from adacm2_jax.training.step import refuse_learning
from data.feature_cache import cache
from data.feature_cache.shards import missing_shards, shard_clips, write_shard
from data.jsonl import Example
from data.pipeline import clips, iter_batches, stack
from data.sources import open_source
from data.training_set import clip_loader


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be done, in words that another process understands.

    Attributes:
      config: the experiment as JSON.
      split: whose clips.
      output: directory of the cache.
      images: of ``training.step.images_at_a_time``.
    """

    config: str
    split: str
    output: str
    images: tuple[int, int, int]

    def experiment(self) -> Experiment:
        """The experiment, typed again."""
        return experiments.read(json.loads(self.config))


class Some(Sequence[Example]):
    """Some examples of a source."""

    def __init__(self, source: Sequence[Example], numbers: Sequence[int]):
        self._source, self._numbers = source, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index):
        return self._source[self._numbers[index]]


class Worker:
    """Computes shards: the clips decoded, their frames through the ViT, the features written.

    Args:
      job: what is to be done.
      workers: decoding processes; 0 decodes in threads.
    """

    def __init__(self, job: Job, workers: int = 0):
        config = job.experiment()
        self._load = clip_loader(config)
        self._source = main_first(lambda: open_source(config.data, job.split))
        self._first = cache.clips_of(self._source)[0]
        self._output, self._workers = job.output, workers
        mesh = make_mesh((-1, 1), jax.local_devices())
        params = load_vision(config, mesh)
        self.vision = describe_vision(config.model, params)
        self._encoder = Encoder(config.model, params, mesh, job.images)

    def write(self, manifest: dict, shard: int) -> None:
        """Computes a shard, unless somebody has.

        Raises:
          DataError: if the ViT here is not the manifest's.
        """
        cache.check_fit(self._output, manifest, {"vision": self.vision})
        if shard in missing_shards(self._output, manifest):
            numbers = [self._first[clip] for clip in shard_clips(manifest, shard)]
            features = self._features(Some(self._source, numbers))
            write_shard(self._output, manifest, shard, features)

    def _features(self, examples: Sequence[Example]) -> Iterator[np.ndarray]:
        # Decoding processes divide batches among themselves, so one clip is a batch there.
        batches = clips(examples, self._load).batch(1, drop_remainder=False, batch_fn=stack)
        reader = iter_batches(batches, self._workers)
        rows = self._encoder.clips(self._load.num_frames)
        try:
            while group := list(itertools.islice(reader, rows)):
                frames, valid = ([each[key] for each in group] for key in ("frames", "valid"))
                yield from self._encoder(np.concatenate(frames), np.concatenate(valid))
        finally:
            reader.close()


@functools.lru_cache(maxsize=1)
def worker_of(job: Job) -> Worker:
    """The worker of this process; the ViT is loaded and compiled once."""
    return Worker(job)


def load_vision(config: Experiment, mesh: Mesh) -> dict:
    """The ViT's parameters, as training would start with them."""
    groups = config.optim.groups
    abstract = abstract_params(config.model, groups, mesh)
    refuse_learning(split_params(abstract, groups)[0])
    return vision_params(config.init_from, config.model, abstract, config.init_missing, config.seed)
