"""Trains AdaCM² on videos with questions and answers.

    python train.py --config configs/needle.py --workdir runs/needle [--config.train.steps=100]

The same command goes on with a run that was stopped, from its newest checkpoint.
"""

import json
import pathlib
import signal
import sys

import flax.linen as nn
import grain
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

import eval as evaluation
from adacm2_jax import app
from adacm2_jax.checkpoint import (
    Checkpoints,
    check_same,
    read_config,
    restore_params,
    write_config,
)
from adacm2_jax.config import AdaCM2Config, from_dict
from adacm2_jax.errors import UserError
from adacm2_jax.metrics import MetricWriter
from adacm2_jax.models.adacm2 import init_params, plan_for
from adacm2_jax.optim import make_optimizer, split_params
from adacm2_jax.processor import LLM_DIR, Processor, train_tokenizers
from adacm2_jax.sharding import make_mesh, param_shardings, replicated, shard_batch
from adacm2_jax.train_step import Batch, TrainState, first_nonfinite, make_train_step
from data.cache import cached_clips
from data.errors import DataError
from data.pipeline import LoadClip, clips, training_batches
from data.sources import open_source

#: Fields that may change when a run is resumed: they do not alter what is computed.
FREE = ("eval.", "checkpoint.", "train.log_every", "data.workers", "data.cache", "mesh")


def train_and_evaluate(config: ConfigDict, workdir: str) -> dict:
    """Trains to ``config.train.steps`` and evaluates; returns the metrics of the evaluation.

    Raises:
      UserError, DataError: for a configuration, checkpoint or data set that cannot be used.
    """
    model_config = from_dict(config.model.to_dict())
    plan_for(model_config)  # ratios without a bound are found here
    root = pathlib.Path(workdir)
    stored = json.loads(config.to_json())
    if (root / "config.json").exists():
        check_same(read_config(root), stored, root, FREE)
    mesh = make_mesh(tuple(config.mesh))
    source = open_source(config.data, "train")
    root.mkdir(parents=True, exist_ok=True)
    processor = make_processor(config, model_config, source, root)
    write_config(root, stored)

    with jax.set_mesh(mesh):
        # Parameters: an own checkpoint overrides them below.
        learned, frozen = split_params(make_params(config, model_config, mesh), config.optim.groups)
        optimizer, schedule = make_optimizer(learned, steps=config.train.steps, **config.optim)
        state = TrainState(
            step=jax.device_put(np.int32(0), replicated(mesh)),
            learned=learned,
            frozen=frozen,
            opt_state=jax.jit(optimizer.init)(learned),
        )

        # Where the run stands.
        batches = make_batches(config, model_config, source)
        checkpoints = Checkpoints(root, config.checkpoint.keep)
        checkpoints.save_frozen(frozen)
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(state, grain.checkpoint.CheckpointRestore(batches))
            print(f"resumed {workdir} at step {int(state.step)}", flush=True)
        first, last = int(state.step) + 1, config.train.steps
        writer = MetricWriter(root, first - 1)

        # One batch, one step.
        train_step = make_train_step(model_config, optimizer, config.seed)
        stop = StopOnSignal()
        bar = tqdm(total=last, initial=first - 1, desc="train", disable=None, unit="step")
        for step in range(first, last + 1):
            batch = make_batch(next(batches), config, processor)
            state, metrics = train_step(state, shard_batch(batch, mesh))
            if bad := first_nonfinite(metrics):
                checkpoints.close()
                raise UserError(
                    f"step {step}: {bad} is not finite; the newest checkpoint is of step "
                    f"{checkpoints.latest_step}: lower optim.learning_rate or optim.clip_norm"
                )
            bar.update()
            if step % config.train.log_every == 0 or step == last:
                scalars = {name: float(value) for name, value in metrics.items()}
                writer.write(step, scalars | {"learning_rate": float(schedule(step - 1))})
                bar.set_postfix(loss=scalars["loss"], accuracy=scalars["token_accuracy"])
            if step % config.checkpoint.every == 0 or step == last or stop.signal:
                checkpoints.save(state, grain.checkpoint.CheckpointSave(batches))
            if stop.signal:
                checkpoints.close()
                print(f"stopped after step {step}; the same command goes on", flush=True)
                sys.exit(128 + stop.signal)
            if config.eval.every and step % config.eval.every == 0 and step < last:
                results = evaluation.evaluate(config, state.params, processor, root)
                for name, result in results["policies"].items():
                    writer.write(step, {f"eval/{name}/accuracy": result["accuracy"]})
        bar.close()
        batches.close()
        checkpoints.close()

    results = evaluation.evaluate(config, state.params, processor, root)
    for name, result in results["policies"].items():
        writer.write(last, {f"eval/{name}/accuracy": result["accuracy"]})
    writer.close()
    return results


class StopOnSignal:
    """Notes SIGTERM (a preemption, a scheduler's time limit), so that the step can be finished."""

    def __init__(self):
        self.signal = 0
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, _) -> None:
        self.signal = number


def make_processor(config, model_config: AdaCM2Config, source, root: pathlib.Path) -> Processor:
    """The run's tokenizers: its own, the given ones, those of ``init_from``, or newly learned."""
    for directory in (root, config.tokenizers, config.init_from):
        if directory and (pathlib.Path(directory) / LLM_DIR).is_dir():
            processor = Processor.load(directory, model_config)
            processor.save(root)
            return processor
    if config.tokenizers or config.init_from:
        raise UserError(
            f"no tokenizers in {config.tokenizers or config.init_from}; set tokenizers to a directory "
            f"that holds {LLM_DIR}/"
        )
    texts = [text for example in source for text in (example.question, example.answer)]
    return train_tokenizers(texts, model_config, root)


def make_params(config, model_config: AdaCM2Config, mesh):
    """Parameters to start from: those of ``init_from``, or fresh ones, where they belong."""
    boxed = jax.eval_shape(lambda key: init_params(model_config, key), jax.random.key(0))
    shardings = param_shardings(boxed, mesh)
    if config.init_from:
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            nn.unbox(boxed),
            shardings,
        )
        return restore_params(config.init_from, abstract)
    init = jax.jit(lambda key: nn.unbox(init_params(model_config, key)), out_shardings=shardings)
    return init(jax.random.key(config.seed))


def make_batches(config, model_config: AdaCM2Config, source):
    """This process's endless, resumable batches; decoded clips are cached if asked."""
    data = config.data
    sampling = evaluation.make_sampling(data.sampling)
    load = LoadClip(
        sampling,
        config.train.num_frames,
        model_config.vision.image_size,
        data.jitter,
        data.on_truncated,
    )
    dataset = cached_clips(source, load, data.cache_dir) if data.cache else clips(source, load)
    rows, processes = config.train.batch_size, jax.process_count()
    if rows % processes:
        raise UserError(f"train.batch_size = {rows} does not divide over {processes} processes")
    return training_batches(
        dataset,
        batch_size=rows // processes,
        seed=config.seed,
        workers=data.workers,
        rank=jax.process_index(),
        world=processes,
    )


def make_batch(rows: dict, config, processor: Processor) -> Batch:
    """Texts to ids. A clip that could not be read has no frame, and then no target either."""
    prompts = [config.data.prompt.format(question=text) for text in rows["question"]]
    question, targets = processor.training(prompts, rows["answer"].tolist())
    targets = targets & rows["valid"].any(axis=1, keepdims=True)
    return Batch(rows["frames"], rows["valid"], rows["index"], question, targets)


def main() -> None:
    results = train_and_evaluate(flags.FLAGS.config, flags.FLAGS.workdir)
    print(evaluation.table(results))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("workdir", None, "Where the run is kept.", required=True)
    app.run(main, sys.argv, (DataError,))
