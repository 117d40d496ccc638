"""Trains AdaCM² on videos with questions and answers.

    python train.py --config configs/needle.py:first --workdir runs/first [--config.train.steps=100]

The same command goes on with a run that was stopped, from its newest checkpoint, also on another
mesh or with another number of processes (see adacm2_jax/distributed.py).
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
from typing import NoReturn

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

import eval as evaluation
from adacm2_jax.config import AdaCM2Config
from adacm2_jax.distributed import (
    Preemption,
    connect,
    default_sigterm,
    is_main,
    main_first,
    wait_for_all,
)
from adacm2_jax.errors import DataError, UserError
from adacm2_jax.inference.encoder import describe_vision
from adacm2_jax.inference.processor import LLM_DIR, Processor, train_tokenizers
from adacm2_jax.models.params import abstract_params, fresh_params, join_params, split_params
from adacm2_jax.runs import app
from adacm2_jax.runs.checkpoint import (
    Checkpoints,
    check_alike,
    check_same,
    read_base,
    read_config,
    read_link,
    saved_steps,
    write_config,
)
from adacm2_jax.runs.load import check_start, resume_frozen, start_params
from adacm2_jax.runs.metrics import MetricWriter
from adacm2_jax.runs.profiling import Profile
from adacm2_jax.sharding import data_share, make_mesh, rows_per_process, shard_batch
from adacm2_jax.training.optim import make_optimizer
from adacm2_jax.training.step import (
    Batch,
    StepConfig,
    TrainState,
    abstract_train_state,
    check_step,
    explain_nonfinite,
    init_train_state,
    make_train_step,
    refuse_learning,
)
from data.cache import cached_clips
from data.feature_cache.cache import check_weights, open_features
from data.pipeline import LoadClip, clips, training_batches
from data.sources import open_source

#: Fields that may change when a run is resumed: they do not alter what is computed.
FREE = (
    "eval.",
    "generation.",
    "checkpoint.",
    "train.log_every",
    "train.chunk",
    "data.cache",
    "data.data_dir",
    "data.workers",
    "mesh",
)


def train_and_evaluate(config: ConfigDict, workdir: str, profile: int = 0) -> dict:
    """Trains to ``config.train.steps`` and evaluates; returns the metrics of the evaluation.

    Args:
      config: the experiment.
      workdir: where the run is kept.
      profile: steps to trace, see adacm2_jax/runs/profiling.py.

    Raises:
      UserError, DataError: for a configuration, checkpoint or data set that cannot be used.
    """
    # All that can be wrong, before anything is computed.
    root, stored = pathlib.Path(workdir), json.loads(config.to_json())
    resumed = (root / "config.json").exists()
    if resumed:
        check_same(read_config(root), stored, root, FREE + free_base(root, config.init_from))
    model_config = evaluation.check(config)
    for field in ("dtype", "qformer_dtype"):
        if getattr(model_config, field) == "float16":
            raise UserError(
                f"model.{field} is 'float16', which is for evaluation: gradients underflow in it; "
                "train in bfloat16"
            )
    load = make_load(config, model_config)
    how = make_step(config)
    mesh = make_mesh(tuple(config.mesh))
    connect(mesh)
    rows_per_process(config.train.batch_size, mesh, how.accumulate)
    abstract = abstract_params(model_config, config.optim.groups, mesh)
    check_step(how, split_params(abstract, config.optim.groups)[0], config.train.num_frames)
    if config.data.features:
        refuse_learning(split_params(abstract, config.optim.groups)[0])
    if config.init_from and not saved_steps(root):
        check_start(config.init_from, model_config, abstract, config.init_missing)
    source = main_first(lambda: open_source(config.data, "train"))
    tested = main_first(lambda: open_source(config.data, config.eval.split))
    root.mkdir(parents=True, exist_ok=True)
    processor = main_first(lambda: make_processor(config, model_config, source, root, resumed))
    evaluation.check_questions(config, processor, source)
    evaluation.check_questions(config, processor, tested)
    if missing := evaluation.missing_videos(source):
        print(
            f"warning: {len(missing)} training videos are missing: {missing[0]} …", file=sys.stderr
        )
    dataset = main_first(lambda: make_dataset(config, model_config, source, load))
    rank, world = data_share(mesh)
    batches = training_batches(
        dataset,
        batch_size=config.train.batch_size,
        seed=config.seed,
        workers=config.data.workers,
        rank=rank,
        world=world,
    )
    write_config(root, stored)
    wait_for_all()
    check_alike(read_config(root), stored)

    with (
        contextlib.closing(batches),
        contextlib.closing(
            Checkpoints(root, config.checkpoint.keep, config.checkpoint.keep_every)
        ) as checkpoints,
    ):
        # The state: of the run's own checkpoint, else from given or from fresh parameters.
        learned = split_params(abstract, config.optim.groups)[0]
        optimizer, schedule = make_optimizer(learned, steps=config.train.steps, **config.optim)
        if checkpoints.latest_step is None:
            state = start(config, model_config, abstract, optimizer, mesh)
            checkpoints.save_frozen(state.frozen, config.init_from)
        else:
            state, place = resume(config, abstract, optimizer, mesh, root, checkpoints)
            check_examples(place, len(dataset))
            batches.seek(place["examples"])
            if is_main():
                print(f"resumed {workdir} at step {int(state.step)}", flush=True)
        if config.data.features:
            check_weights(config.data.features, describe_vision(model_config, state.params))
        first, last = int(state.step) + 1, config.train.steps

        with contextlib.closing(MetricWriter(root, first - 1)) as writer:

            def save() -> None:
                checkpoints.save(state, {"examples": batches.examples, "of": len(dataset)})

            def evaluate(step: int) -> dict:
                results = evaluation.evaluate(config, state.params, processor, root)
                for name, result in results["policies"].items():
                    if result["accuracy"] is not None:
                        writer.write(step, {f"eval/{name}/accuracy": result["accuracy"]})
                return results

            def stop(step: int, number: int) -> NoReturn:
                checkpoints.wait()
                print(f"stopped after step {step}; the same command goes on", flush=True)
                sys.exit(128 + number)

            def stop_if_asked(step: int) -> None:
                checkpoints.wait()  # which may take long
                if number := preemption.agreed():
                    stop(step, number)

            train_step = make_train_step(model_config, optimizer, config.seed, state, how)
            quiet = not is_main() or None  # None: where it is no terminal
            bar = tqdm(total=last, initial=first - 1, desc="train", disable=quiet, unit="step")
            with Preemption() as preemption, contextlib.closing(Profile(root, profile)) as trace:
                for step in range(first, last + 1):
                    trace.begin_step(step)
                    # Before the step after it, so that a resumed run makes up for a missed one.
                    if config.eval.every and step > 1 and (step - 1) % config.eval.every == 0:
                        save()
                        stop_if_asked(step - 1)
                        with default_sigterm():  # nothing would be lost
                            evaluate(step - 1)
                    batch = make_batch(next(batches), config, processor)
                    with jax.set_mesh(mesh):
                        state, metrics = train_step(state, shard_batch(batch, mesh))
                    metrics = {
                        name: float(value) for name, value in jax.device_get(metrics).items()
                    }
                    if reason := explain_nonfinite(state, metrics):
                        raise UserError(
                            f"step {step}: {reason}. Lower optim.learning_rate or optim.clip_norm, "
                            "or look at init_from; the newest checkpoint is "
                            f"{checkpoints.latest_step}"
                        )
                    bar.update()
                    if step % config.train.log_every == 0 or step == last:
                        writer.write(step, metrics | {"learning_rate": float(schedule(step - 1))})
                        bar.set_postfix(loss=metrics["loss"], accuracy=metrics["token_accuracy"])
                    checkpoints.check()
                    asked = preemption.agreed()
                    if step % config.checkpoint.every == 0 or step == last or asked:
                        save()
                    if asked:
                        stop(step, asked)
                stop_if_asked(last)
            bar.close()
            return evaluate(last)


def free_base(root: pathlib.Path, init_from: str) -> tuple[str, ...]:
    """``init_from`` as a field that may change, where a base counts by its fingerprint: in a run
    that has steps (which are compared with it), or where this one is the same in another place."""
    link = read_link(root)
    same = link and read_base(init_from).get("fingerprint") == link["fingerprint"]
    return ("init_from",) if same or (link and saved_steps(root)) else ()


def make_processor(
    config, model_config: AdaCM2Config, source, root: pathlib.Path, resumed: bool
) -> Processor:
    """The run's tokenizers: its own, the given ones, those of ``init_from``, or newly learned.

    Process 0 writes them where they are the run's own for all others.
    """
    if resumed or not is_main():
        return Processor.load(root, model_config)
    for directory in (config.tokenizers, config.init_from):
        if directory and (pathlib.Path(directory) / LLM_DIR).is_dir():
            processor = Processor.load(directory, model_config)
            processor.save(root)
            return processor
    if config.tokenizers or config.init_from:
        raise UserError(
            f"no tokenizers in {config.tokenizers or config.init_from}; set tokenizers to a "
            f"directory that holds {LLM_DIR}/"
        )
    texts = [text for example in source for text in (example.question, example.answer)]
    return train_tokenizers(texts, model_config, root)


def start(config, model_config: AdaCM2Config, abstract: dict, optimizer, mesh) -> TrainState:
    """The state before the first step, with parameters of ``init_from`` or fresh ones."""
    if config.init_from:
        params = start_params(
            config.init_from, model_config, abstract, config.init_missing, config.seed
        )
    else:
        params = join_params(fresh_params(model_config, abstract, config.seed), {})
    return init_train_state(*split_params(params, config.optim.groups), optimizer, mesh)


def resume(
    config, abstract: dict, optimizer, mesh, root: pathlib.Path, checkpoints: Checkpoints
) -> tuple[TrainState, dict]:
    """The state of the run's newest checkpoint, each of its arrays read once, and the place in the
    data."""
    shapes = abstract_train_state(*split_params(abstract, config.optim.groups), optimizer, mesh)
    frozen = resume_frozen(root, abstract, shapes.frozen, config.init_from)
    return checkpoints.restore(shapes.replace(frozen=frozen))


def check_examples(place: dict, count: int) -> None:
    """The order of examples depends on their number."""
    before = place.get("of", count)  # older versions did not note it
    if before != count:
        raise UserError(
            f"there are {count} training examples, but {before} when the checkpoint was "
            "written: the run would repeat some and miss others. Bring the same data, or start "
            "another run from this one with init_from"
        )


def make_load(config, model_config: AdaCM2Config) -> LoadClip:
    """How a training clip is read; a clip holds all frames that the sampling takes."""
    data, frames = config.data, config.train.num_frames
    sampling = evaluation.make_sampling(data.sampling)
    if sampling.mode == "uniform" and sampling.num_frames > frames:
        raise UserError(
            f"train.num_frames = {frames} would cut off some of the {sampling.num_frames} frames "
            "of data.sampling.num_frames; make them equal"
        )
    if sampling.mode == "fps":
        most = min(sampling.max_frames or frames, frames)
        sampling = dataclasses.replace(sampling, max_frames=most)
    size = model_config.vision.image_size
    return LoadClip(sampling, frames, size, data.jitter, data.on_truncated, data.resize)


def make_dataset(config, model_config: AdaCM2Config, source, load: LoadClip):
    """Clips to train on: decoded as they are needed, decoded before, or as the ViT's features."""
    data, vision = config.data, model_config.vision
    if data.features and data.cache:
        raise UserError(
            f"data.features = {data.features} and data.cache: decoded clips would not be read; "
            "unset one"
        )
    if data.features:
        return open_features(
            data.features,
            source,
            load,
            describe_vision(model_config),
            (load.num_frames, vision.tokens_per_frame, vision.width),
            "bfloat16" if model_config.feature_dtype == "bfloat16" else "float32",
        )
    if data.cache:
        return cached_clips(source, load, data.cache_dir, data.workers)
    return clips(source, load)


def make_step(config) -> StepConfig:
    """How the training step is computed."""
    train = config.train
    return StepConfig(train.gradient, train.chunk, train.accumulate)


def make_batch(rows: dict, config, processor: Processor) -> Batch:
    """Texts to ids. A clip that could not be read has no frame, and then no target either."""
    prompts = [config.data.prompt.format(question=text) for text in rows["question"]]
    question, targets = processor.training(prompts, rows["answer"].tolist())
    targets = targets & rows["valid"].any(axis=1, keepdims=True)
    return Batch(rows["frames"], rows["valid"], rows["index"], question, targets)


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("workdir", None, "Where the run is kept.", required=True)
    flags.DEFINE_integer("profile", 0, "Steps to trace into WORKDIR/profile; 0: none.", 0)


def main() -> None:
    if flags.FLAGS.config is None:
        raise UserError("--config is missing: name an experiment, such as configs/needle.py")
    args = flags.FLAGS
    workdir = app.directory("workdir", args.workdir)
    results = train_and_evaluate(args.config, workdir, args.profile)
    if is_main():
        print(evaluation.table(results))


if __name__ == "__main__":
    define_flags()
    app.run(main, sys.argv, (DataError,))
