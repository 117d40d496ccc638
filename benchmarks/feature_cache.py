"""How much faster are training steps from a cache of features than from pixels?

    python benchmarks/feature_cache.py [--steps 2] [--rounds 5] [--json out.json]

Trains on videos of the needle task, decoded as they are needed, with the ViT frozen, and on the
features that ``adacm2 prepare`` makes of them, in turn. A step is everything: reading the batch,
the texts, the compiled step. The Q-Former and the language model are those of ``tiny``.
"""

import argparse
import contextlib
import json
import pathlib
import tempfile

import _paired  # before JAX: it sets the number of threads
import _report
import jax

from adacm2_jax.commands import prepare
from adacm2_jax.commands.train import make_batch
from adacm2_jax.config import VisionConfig, tiny
from adacm2_jax.inference.encoder import describe_vision
from adacm2_jax.inference.processor import train_tokenizers
from adacm2_jax.models.params import abstract_params, fresh_params, join_params, split_params
from adacm2_jax.runs.experiment import read
from adacm2_jax.sharding import make_mesh, shard_batch
from adacm2_jax.training.optim import make_optimizer
from adacm2_jax.training.step import init_train_state, make_train_step
from configs.base import base_config
from data.feature_cache.cache import finish
from data.pipeline import training_batches
from data.sources import open_source
from data.training_set import training_set

SETTINGS = {
    "tiny: 17 tokens, 3 blocks of 96": tiny().vision,
    "small: 65 tokens, 6 blocks of 384": VisionConfig(112, 14, 384, 6, 6, 1536),
}


def make_config(vision: VisionConfig, directory: pathlib.Path):
    """Clips of eight frames, four a step."""
    config = base_config(tiny(vision=vision))
    config.data.source, config.data.data_dir = "needle", str(directory / "data")
    config.data.needle.num_frames = config.train.num_frames = 8
    config.data.needle.train_size, config.data.needle.test_size = 64, 1
    config.train.batch_size, config.optim.warmup_steps = 4, 1
    return config


def make_run(experiment, directory: pathlib.Path, steps: int):
    """A function that trains on so many steps more."""
    model = experiment.model
    mesh, groups = make_mesh(), experiment.optim.groups
    source = open_source(experiment.data, "train")
    texts = [text for example in source for text in (example.question, example.answer)]
    processor = train_tokenizers(texts, model, directory / "tokenizers")
    dataset = training_set(experiment, source, describe_vision(model))
    batches = training_batches(dataset, batch_size=experiment.train.batch_size, seed=0)
    params = join_params(fresh_params(model, abstract_params(model, groups, mesh), 0), {})
    learned, frozen = split_params(params, groups)
    optimizer, _ = make_optimizer(learned, steps=experiment.train.steps, **experiment.optim.rule)
    state = init_train_state(learned, frozen, optimizer, mesh)
    step = make_train_step(model, optimizer, 0, state, experiment.train.step)

    def run() -> None:
        nonlocal state
        for _ in range(steps):
            batch = make_batch(next(batches), experiment, processor)
            with jax.set_mesh(mesh):
                state, metrics = step(state, shard_batch(batch, mesh))
            jax.block_until_ready(metrics)

    return run, batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()
    results = _paired.header()
    print(f"{'ViT':34} {'pixels':>10} {'features':>10}   features : pixels (quartiles)")
    for name, vision in SETTINGS.items():
        with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
            directory = pathlib.Path(made)
            config = make_config(vision, directory)
            output = str(directory / "features")
            job, manifest = prepare.plan(read(config), "train", output, "", 0, 0)
            finish(output, prepare.run_local(job, manifest, 0))
            pixels, batches = make_run(read(config), directory, args.steps)
            stack.callback(batches.close)
            config.data.features = output
            features, batches = make_run(read(config), directory, args.steps)
            stack.callback(batches.close)
            row = _paired.paired(features, pixels, args.rounds)
        rates = {
            side: args.steps / row[key]
            for side, key in (("pixels", "theirs"), ("features", "ours"))
        }
        results["rows"].append(row | rates | dict(vit=name, model=json.loads(job.config)["model"]))
        speeds = f"{rates['pixels']:6.2f} /s  {rates['features']:6.2f} /s"
        print(f"{name:34} {speeds}   {_report.ratio(row)}", flush=True)
    _report.write_json(args.json, results)


if __name__ == "__main__":
    main()
