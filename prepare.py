"""Computes the features of a training set once, as a cache that training reads instead of pixels.

    python prepare.py --config configs/X.py --output DIR [--dtype int8] [--shards 64]
    python train.py --config configs/X.py --workdir runs/x --config.data.features=DIR

The same command goes on with one that was stopped, with the shards that are missing. Processes of
one job (``--distributed``) share the shards; ``--runner`` gives them to Apache Beam instead.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

import eval as evaluation
import train
from adacm2_jax.config import AdaCM2Config
from adacm2_jax.distributed import is_main, main_first, wait_for_all
from adacm2_jax.errors import DataError, UserError
from adacm2_jax.files import remove_abandoned
from adacm2_jax.inference.encoder import Encoder, describe_vision
from adacm2_jax.models.params import abstract_params, split_params
from adacm2_jax.runs import app
from adacm2_jax.runs.load import vision_params
from adacm2_jax.sharding import make_mesh
from adacm2_jax.training.step import images_at_a_time, refuse_learning
from data import features as cache
from data.feature_cache.shards import (
    DTYPES,
    check_room,
    missing_shards,
    shard_clips,
    write_shard,
)
from data.jsonl import Example
from data.pipeline import clips, iter_batches, stack
from data.sources import open_source


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be done, in words that another process understands.

    Attributes:
      config: the experiment, JSON.
      split: whose clips.
      output: directory of the cache.
      images: of ``training.step.images_at_a_time``.
    """

    config: str
    split: str
    output: str
    images: tuple[int, int, int]


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
        config = ConfigDict(json.loads(job.config))
        model_config = evaluation.check(config)
        self._load = train.make_load(config, model_config)
        self._source = main_first(lambda: open_source(config.data, job.split))
        self._first = cache.clips_of(self._source)[0]
        self._output, self._workers = job.output, workers
        mesh = make_mesh((-1, 1), jax.local_devices())
        params = load_vision(config, model_config, mesh)
        self.vision = describe_vision(model_config, params)
        self._encoder = Encoder(model_config, params, mesh, job.images)

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


def load_vision(config: ConfigDict, model_config: AdaCM2Config, mesh) -> dict:
    """The ViT's parameters, as ``train.py`` would start with them."""
    groups = config.optim.groups
    abstract = abstract_params(model_config, groups, mesh)
    refuse_learning(split_params(abstract, groups)[0])
    return vision_params(config.init_from, model_config, abstract, config.init_missing, config.seed)


def plan(
    config: ConfigDict, split: str, output: str, dtype: str, shards: int, rows: int
) -> tuple[Job, dict]:
    """Finds what is wrong before anything is computed.

    Args:
      config: the experiment.
      split: whose clips.
      output: directory of the cache.
      dtype: of the features; empty for the model's own.
      shards: how many files; 0 for a number that suits.
      rows: clips that a device has at a time in training; 0 for what this machine would have.

    Returns:
      The job, and the manifest that the cache is to have, without the hash of the weights.

    Raises:
      UserError, DataError: for what cannot be done, or an output that holds something else.
    """
    model_config = evaluation.check(config)
    load, how = train.make_load(config, model_config), train.make_step(config)
    if dtype not in ("", *DTYPES):
        raise UserError(f"--dtype={dtype}: it must be {', '.join(DTYPES)}")
    mesh = make_mesh(tuple(config.mesh))
    batch_size, frames = config.train.batch_size, config.train.num_frames
    if rows:
        batch_size = rows * mesh.shape["data"] * how.accumulate
    images = images_at_a_time(how, frames, batch_size, mesh)
    vision = model_config.vision
    remove_abandoned(output)
    stored = cache.read_manifest(output)
    if stored:
        shards = shards or stored["shards"]
    source = main_first(lambda: open_source(config.data, split))
    manifest = cache.make_manifest(
        source,
        load,
        describe_vision(model_config),
        dtype=dtype or model_config.feature_dtype,
        shards=shards,
        shape=(frames, vision.tokens_per_frame, vision.width),
        computed={"images": list(images)},
    )
    if stored:
        fields = {name: value for name, value in manifest.items() if name != "computed"}
        cache.check_fit(output, stored, fields)
        images = tuple(stored["computed"]["images"])
    elif pathlib.Path(output).exists() and any(pathlib.Path(output).iterdir()):
        raise UserError(f"--output={output} holds something else; name an empty directory")
    if missing := evaluation.missing_videos(source):
        print(
            f"warning: {len(missing)} videos are missing: {missing[0]} …; they get no features",
            file=sys.stderr,
        )
    return Job(config.to_json(), split, output, images), stored or manifest


def begin(job: Job, manifest: dict, weights: str) -> dict:
    """Checks the weights, makes room and writes the manifest; returns it.

    Raises:
      DataError: for a cache of other weights, or a disk without room.
    """
    stored = cache.read_manifest(job.output)
    manifest = cache.with_key(manifest | {"vision": manifest["vision"] | {"weights": weights}})
    if stored:
        cache.check_fit(job.output, stored, {"vision": manifest["vision"]})
        manifest = stored
    check_room(job.output, manifest)
    wait_for_all()  # all have looked
    if is_main() and not stored:
        cache.write_manifest(job.output, manifest)
    wait_for_all()
    # Another process may have been given another command.
    cache.check_fit(job.output, cache.read_manifest(job.output), manifest)
    return manifest


def run_local(job: Job, manifest: dict, workers: int) -> dict:
    """Computes what is missing, this process its share of it; returns the manifest."""
    worker = Worker(job, workers)
    manifest = begin(job, manifest, worker.vision["weights"])
    missing = missing_shards(job.output, manifest)
    wait_for_all()  # all have the same list
    mine = missing[jax.process_index() :: jax.process_count()]
    for shard in tqdm(mine, desc="prepare", unit="shard", disable=None):
        worker.write(manifest, shard)
    return manifest


def run_beam(job: Job, manifest: dict, runner: str, options: Sequence[str]) -> dict:
    """The same by an Apache Beam pipeline, which decides who computes which shard."""
    try:
        import prepare_beam
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "apache_beam":
            raise
        raise UserError(
            f"--runner={runner} needs Apache Beam: pip install apache-beam, see docs/features.md"
        ) from None
    beam_options = prepare_beam.options_of(runner, options)
    config = ConfigDict(json.loads(job.config))
    model_config = evaluation.check(config)
    mesh = make_mesh((-1, 1), jax.local_devices())
    weights = describe_vision(model_config, load_vision(config, model_config, mesh))["weights"]
    manifest = begin(job, manifest, weights)
    missing = missing_shards(job.output, manifest)
    prepare_beam.run(job, manifest, missing, beam_options)
    return manifest


def report(output: str, manifest: dict) -> str:
    """What was made, in a line."""
    done = manifest["done"]
    error = done["error"]
    lines = (
        f"{output}: {done['frames']} frames of {manifest['source']['clips']} clips, "
        f"{done['bytes'] / 1e9:.3g} GB in {manifest['shards']} shards of {manifest['dtype']}"
    )
    if error["rms"]:
        lines += f"; error {error['rms']:.2e} rms, {error['largest']:.2e} at most (of a token)"
    if done["unreadable"]:
        lines += f"; {done['unreadable']} clips could not be read"
    return lines


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("output", None, "Where the features are kept.", required=True)
    flags.DEFINE_string("split", "train", "Whose features.")
    flags.DEFINE_string("dtype", "", "bfloat16, float32 or int8; by default the model's own.")
    flags.DEFINE_integer("shards", 0, "Files; 0: of about 1 GB, at least 8.", 0)
    flags.DEFINE_integer("rows", 0, "Clips a device has at a time in training; 0: as here.", 0)
    flags.DEFINE_string("runner", "local", "local, or an Apache Beam runner: direct, dataflow …")
    flags.DEFINE_multi_string("beam", [], "An option of Apache Beam, without its two dashes.")


def main() -> None:
    args = flags.FLAGS
    if args.config is None:
        raise UserError("--config is missing: name an experiment, such as configs/needle.py")
    output = os.path.abspath(app.directory("output", args.output))
    job, manifest = plan(args.config, args.split, output, args.dtype, args.shards, args.rows)
    if args.runner == "local":
        manifest = run_local(job, manifest, args.config.data.workers)
    else:
        manifest = run_beam(job, manifest, args.runner, args.beam)
    wait_for_all()
    if is_main():
        print(report(args.output, cache.finish(output, manifest)))


if __name__ == "__main__":
    define_flags()
    app.run(main, sys.argv, (DataError,))
