"""The clips that an experiment trains on: decoded on demand, decoded before, or as features."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import grain

from adacm2_jax.errors import DataError, printable
from adacm2_jax.video.frames import probe
from adacm2_jax.video.room import host_memory
from data.cache import cached_clips
from data.feature_cache.cache import open_features
from data.jsonl import Example, JsonlSource
from data.pipeline import LoadClip, clips
from data.workers import auto_workers, cores

#: Videos that are tried to learn how large they are.
_TRIED = 8


def clip_loader(experiment: Any) -> LoadClip:
    """How a training clip of an experiment is read.

    Raises:
      UserError: if a clip has not room for all frames of the sampling.
    """
    data = experiment.data
    return LoadClip(
        experiment.clip_sampling,
        experiment.train.num_frames,
        experiment.model.vision.image_size,
        data.jitter,
        data.on_truncated,
        data.resize,
    )


def decoding_workers(experiment: Any, source: Sequence[Example], rows: int) -> int:
    """Processes that decode for one of the job: ``data.workers``, or what suits this machine.

    Args:
      experiment: whose ``data.workers`` may be -1.
      source: of the examples; the first video that can be opened stands for all.
      rows: clips of a batch of this process.
    """
    if experiment.data.workers >= 0:
        return experiment.data.workers
    load = clip_loader(experiment)
    picture = (load.size, load.size)
    for index in range(min(_TRIED, len(source))):
        video = source[index].video
        if not isinstance(video, str | bytes):
            break
        with contextlib.suppress(DataError):
            info = probe(video)
            picture = info.width, info.height
            break
    batch = rows * load.num_frames * load.size**2 * 3
    return auto_workers(cores(), host_memory(), batch, picture)


def training_set(
    experiment: Any, source: Sequence[Example], vision: dict[str, Any], workers: int = 0
) -> grain.MapDataset:
    """Clips to train on, for ``data.pipeline.training_batches``.

    Args:
      experiment: whose ``data`` says where they come from.
      source: of the examples.
      vision: what features depend on in the ViT, as JSON values.
      workers: decoding processes, where clips are decoded beforehand.

    Raises:
      DataError: for a cache that was made from something else, or a disk without room.
    """
    data, model, load = experiment.data, experiment.model, clip_loader(experiment)
    if data.features:
        shape = (load.num_frames, model.vision.tokens_per_frame, model.vision.width)
        return open_features(data.features, source, load, vision, shape, data.features_local)
    if data.cache:
        return cached_clips(source, load, data.cache_dir, workers)
    return clips(source, load)


def warn_of_missing(source: Sequence[Example], what: str) -> None:
    """Says on stderr how many videos of JSON lines are no files.

    Raises:
      DataError: if none is one.
    """
    missing = source.missing_videos() if isinstance(source, JsonlSource) else []
    if not missing:
        return
    if len(missing) == len({example.video for example in source}):
        raise DataError(
            f"{printable(source.path)}: none of its videos is there, the first is "
            f"{printable(missing[0])}; paths are relative to the JSON-lines file"
        )
    first = printable(missing[0])
    print(f"warning: {len(missing)} {what} are missing: {first} …", file=sys.stderr)
