"""Shards of a feature cache, computed: the clips decoded, their frames through the ViT, written."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Generator, Iterator, Sequence

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
from data.feature_cache.shards import Windows, missing_shards, shard_clips, write_shard
from data.feature_cache.windows import LoadRun, Parts, Run, SharedVideo
from data.pipeline import clips, iter_batches, stack
from data.sources import open_source
from data.training_set import clip_loader, decoding_workers


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


class Worker:
    """Computes shards: the clips decoded, their frames through the ViT, the features written.

    Args:
      job: what is to be done.
      workers: decoding processes; 0 decodes in threads, -1 has as many as suit the machine.
    """

    def __init__(self, job: Job, workers: int = 0):
        config = job.experiment()
        load = clip_loader(config)
        self._load = LoadRun(**{f.name: getattr(load, f.name) for f in dataclasses.fields(load)})
        self._source = main_first(lambda: open_source(config.data, job.split))
        self._first = cache.clips_of(self._source)[0]
        self._videos = cache.videos_of(self._source)
        self._output, self._workers = job.output, workers
        if workers < 0:
            self._workers = decoding_workers(config, self._source, 1)
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
            write_shard(self._output, manifest, shard, self._features(manifest, shard))

    def _features(self, manifest: dict, shard: int) -> Iterator[np.ndarray | Windows]:
        """What ``write_shard`` takes."""
        places, first = shard_clips(manifest, shard), 0
        videos: list[int | SharedVideo] = []
        for clips_of_video in self._videos:
            if first in places:
                videos += self._video([self._first[clip] for clip in clips_of_video])
            first += len(clips_of_video)
        parts: list[int | Run] = []
        for video in videos:
            parts += video.runs if isinstance(video, SharedVideo) else [video]
        computed = self._computed(Parts(self._source, parts))
        try:
            for video in videos:
                if isinstance(video, SharedVideo):
                    yield video.windows(computed)
                else:
                    yield next(computed)[0]
        finally:
            computed.close()

    def _video(self, examples: list[int]) -> Sequence[int | SharedVideo]:
        """A video's clips, together where they share frames."""
        if len(examples) > 1:
            video = SharedVideo(self._source, examples, self._load)
            if video.shared:
                return [video]
        return examples

    def _computed(self, parts: Parts) -> Generator[tuple[np.ndarray, bool], None, None]:
        """The features of clips and runs, and whether a run's file is cut short after it."""
        if not len(parts):  # Grain has no batches of nothing
            return
        # Decoding processes divide batches among themselves, so one clip is a batch there.
        batches = clips(parts, self._load).batch(1, drop_remainder=False, batch_fn=stack)
        reader = iter_batches(batches, self._workers)
        rows = self._encoder.clips(self._load.num_frames)
        try:
            while group := list(itertools.islice(reader, rows)):
                frames, valid = ([each[key] for each in group] for key in ("frames", "valid"))
                features = self._encoder(np.concatenate(frames), np.concatenate(valid))
                cuts = [bool(each.get("cut", [False])[0]) for each in group]
                yield from zip(features, cuts, strict=True)
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
