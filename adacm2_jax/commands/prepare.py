"""Computes the features of a training set once, as a cache that training reads instead of pixels.

    adacm2 prepare --config configs/X.py --output DIR [--dtype int8] [--shards 64]
    python train.py --config configs/X.py --workdir runs/x --config.data.features=DIR

The same command goes on with one that was stopped, with the shards that are missing. Processes of
one job (``--distributed``) share the shards; ``--runner`` gives them to Apache Beam instead. It
works at the root of a clone, where the experiments are.
"""

import json
import os
import pathlib
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import config_flags

from adacm2_jax.commands.prepare_worker import Job, Worker, load_vision
from adacm2_jax.distributed import is_main, main_first, wait_for_all
from adacm2_jax.errors import UserError
from adacm2_jax.files import check_writable, remove_abandoned
from adacm2_jax.inference.encoder import describe_vision
from adacm2_jax.progress import Progress
from adacm2_jax.runs import app
from adacm2_jax.runs import experiment as experiments
from adacm2_jax.runs.experiment import Experiment
from adacm2_jax.sharding import make_mesh
from adacm2_jax.training.step import images_at_a_time
from data.feature_cache import cache
from data.feature_cache.shards import DTYPES, check_room, missing_shards
from data.sources import open_source
from data.training_set import clip_loader, warn_of_missing


def plan(
    config: Experiment, split: str, output: str, dtype: str, shards: int, rows: int
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
    model, load, step = config.model, clip_loader(config), config.train.step
    if dtype not in ("", *DTYPES):
        raise UserError(f"--dtype={dtype}: it must be {', '.join(DTYPES)}")
    mesh = make_mesh(tuple(config.mesh))
    batch_size, frames = config.train.batch_size, config.train.num_frames
    if rows:
        batch_size = rows * mesh.shape["data"] * step.accumulate
    images = images_at_a_time(step, frames, batch_size, mesh)
    vision = model.vision
    remove_abandoned(output)
    stored = cache.read_manifest(output)
    if stored:
        shards = shards or stored["shards"]
    source = main_first(lambda: open_source(config.data, split))
    manifest = cache.make_manifest(
        source,
        load,
        describe_vision(model),
        dtype=dtype or model.feature_dtype,
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
    warn_of_missing(source, "videos, which get no features,")
    return Job(json.dumps(experiments.to_dict(config)), split, output, images), stored or manifest


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
    cache.check_fit(job.output, cache.read_manifest(job.output) or {}, manifest)
    return manifest


def run_local(job: Job, manifest: dict, workers: int) -> dict:
    """Computes what is missing, this process its share of it; returns the manifest."""
    worker = Worker(job, workers)
    manifest = begin(job, manifest, worker.vision["weights"])
    missing = missing_shards(job.output, manifest)
    wait_for_all()  # all have the same list
    mine = missing[jax.process_index() :: jax.process_count()]
    with Progress("prepare", len(mine), unit="shards", shown=is_main()) as progress:
        for shard in mine:
            worker.write(manifest, shard)
            progress.update()
    return manifest


def run_beam(job: Job, manifest: dict, runner: str, options: Sequence[str]) -> dict:
    """The same by an Apache Beam pipeline, which decides who computes which shard."""
    try:
        from adacm2_jax.commands import prepare_beam
        from data import beam_runner
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "apache_beam":
            raise
        raise UserError(
            f"--runner={runner} needs Apache Beam: pip install apache-beam, see docs/features.md"
        ) from None
    beam_options = beam_runner.options_of(runner, options)
    config = job.experiment()
    mesh = make_mesh((-1, 1), jax.local_devices())
    weights = describe_vision(config.model, load_vision(config, mesh))["weights"]
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
    if done["stored"] < done["frames"]:
        lines += f"; clips share frames, {done['stored']} are stored"
    if done["unreadable"]:
        lines += f"; {done['unreadable']} clips could not be read"
    return lines


def run(argv: Sequence[str]) -> None:
    """Runs the command and exits; ``argv`` begins with its name."""
    config_flags.DEFINE_config_file("config", lock_config=True, help_string="The experiment.")
    flags.DEFINE_string("output", None, "Where the features are kept.")
    flags.DEFINE_string("split", "train", "Whose features.")
    flags.DEFINE_string("dtype", "", "bfloat16, float32 or int8; by default the model's own.")
    flags.DEFINE_integer("shards", 0, "Files; 0: of about 1 GB, at least 8.", 0)
    flags.DEFINE_integer("rows", 0, "Clips a device has at a time in training; 0: as here.", 0)
    flags.DEFINE_string("runner", "local", "local, or an Apache Beam runner: direct, dataflow …")
    flags.DEFINE_multi_string("beam", [], "An option of Apache Beam, without its two dashes.")
    app.run(_main, argv, __doc__ or "")


def _main() -> None:
    args = flags.FLAGS
    for name, example in (("config", "configs/needle.py"), ("output", "runs/features")):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing: give one, such as --{name} {example}")
    output = os.path.abspath(app.directory("output", args.output))
    config = experiments.read(args.config)
    job, manifest = plan(config, args.split, output, args.dtype, args.shards, args.rows)
    if is_main():
        check_writable(output, f"--output={output}")
    if args.runner == "local":
        manifest = run_local(job, manifest, config.data.workers)
    else:
        manifest = run_beam(job, manifest, args.runner, args.beam)
    wait_for_all()
    if is_main():
        print(report(args.output, cache.finish(output, manifest)))
