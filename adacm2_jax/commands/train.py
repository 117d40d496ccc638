"""A run from its experiment to its evaluation: what ``train.py`` does."""

import contextlib
import os
import pathlib
import sys
from typing import Any, NoReturn

import numpy as np
from jax.sharding import Mesh

from adacm2_jax.commands.evaluate import check_questions, evaluate, task_of
from adacm2_jax.distributed import Preemption, connect, is_main, main_first, wait_for_all
from adacm2_jax.errors import UserError
from adacm2_jax.files import check_writable
from adacm2_jax.inference.encoder import describe_vision
from adacm2_jax.inference.processor import LLM_DIR, Processor, train_tokenizers
from adacm2_jax.models.params import abstract_params, fresh_params, join_params, split_params
from adacm2_jax.models.quantized import refuse_learning_quantized
from adacm2_jax.runs import experiment as experiments
from adacm2_jax.runs.checkpoint import Checkpoints
from adacm2_jax.runs.experiment import MAY_CHANGE, Experiment, check_alike, check_same
from adacm2_jax.runs.load import (
    check_start,
    make_answerer,
    resume_frozen,
    start_params,
    stored_experiment,
)
from adacm2_jax.runs.lock import locked
from adacm2_jax.runs.metrics import MetricWriter
from adacm2_jax.runs.profiling import Profile
from adacm2_jax.runs.workdir import (
    check_path,
    read_base,
    read_config,
    read_link,
    saved_steps,
    write_config,
)
from adacm2_jax.sharding import data_share, make_mesh, rows_per_process, shard_batch
from adacm2_jax.training.ahead import Ahead
from adacm2_jax.training.loop import Callbacks, Every, train
from adacm2_jax.training.optim import make_optimizer
from adacm2_jax.training.step import (
    Batch,
    TrainState,
    abstract_train_state,
    check_step,
    init_train_state,
    make_train_step,
    refuse_learning,
)
from adacm2_jax.training.waits import Waits
from data.feature_cache.cache import check_weights
from data.pipeline import training_batches
from data.sources import open_source
from data.training_set import clip_loader, decoding_workers, training_set, warn_of_missing


def train_and_evaluate(
    experiment: Experiment,
    workdir: str | os.PathLike,
    profile: int = 0,
    at_the_end: bool = True,
) -> dict:
    """Trains to ``train.steps`` and evaluates; returns the metrics of the evaluation.

    A run that is there goes on from its newest checkpoint.

    Args:
      experiment: what is trained.
      workdir: where the run is kept.
      profile: steps to trace, see runs/profiling.py.
      at_the_end: whether the last step is evaluated; if not, there are no metrics.

    Raises:
      UserError: for a configuration, checkpoint or data set that cannot be used.
    """
    # --- All that can be wrong, before anything is computed ------------------------------------
    root, config = pathlib.Path(workdir), experiment
    check_path(root, f"--workdir={root}")
    config.check_training()  # before it is compared: what nobody could use is no difference
    clip_loader(config)
    resumed = os.path.lexists(root / "config.json")  # a link to nowhere is damage
    stored = experiments.to_dict(config)
    if resumed:
        before = experiments.to_dict(stored_experiment(root))
        check_same(before, stored, root, MAY_CHANGE["resume"] + _free_base(root, config.init_from))
        _check_length(root, config)
    mesh = make_mesh(tuple(config.mesh))
    connect(mesh)
    rows_per_process(config.train.batch_size, mesh, config.train.accumulate)
    abstract = abstract_params(config.model, config.optim.groups, mesh)
    learned = split_params(abstract, config.optim.groups)[0]
    refuse_learning_quantized(learned)
    check_step(config.train.step, learned, config.train.num_frames)
    if config.data.features:
        refuse_learning(learned)
    if local := config.data.features_local:
        check_writable(local, f"data.features_local = {local}")
    if config.init_from and not saved_steps(root):
        check_start(config.init_from, config.model, abstract, config.init_missing)

    # --- The data and the tokenizers -------------------------------------------------------------
    source = main_first(lambda: open_source(config.data, "train"))
    tested = main_first(lambda: open_source(config.data, config.eval.split))
    check_writable(root, f"--workdir={root}")
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as opened:
        opened.enter_context(locked(root))
        processor = main_first(lambda: _processor(config, source, root, resumed))
        check_questions(config, processor, source)
        check_questions(config, processor, tested, task_of(config))
        warn_of_missing(source, "training videos")
        vision = describe_vision(config.model)
        rank, world = data_share(mesh)
        each = config.train.batch_size // world
        # What is stored needs no processes, and is large: two batches are ahead of the step's.
        workers = 0 if config.data.features else decoding_workers(config, source, each)
        dataset = main_first(lambda: training_set(config, source, vision, workers))
        rows = training_batches(
            dataset,
            batch_size=config.train.batch_size,
            seed=config.seed,
            workers=workers,
            ahead=2 if config.data.features else 4,
            rank=rank,
            world=world,
        )
        opened.callback(rows.close)
        write_config(root, stored)
        wait_for_all()
        check_alike(read_config(root), stored)

        # --- The state: of the run's own checkpoint, else from given or from fresh parameters ---
        checkpoints = Checkpoints(root, config.checkpoint.keep, config.checkpoint.keep_every)
        opened.callback(checkpoints.close)
        optimizer, schedule = make_optimizer(learned, steps=config.train.steps, **config.optim.rule)
        place = {"of": len(dataset), "source": source.identity()}
        if checkpoints.latest_step is None:
            state = _start(config, abstract, optimizer, mesh)
            _check_features(config, state, root, resumed)
            checkpoints.save_frozen(state.frozen, config.init_from)
        else:
            state, before = _resume(config, abstract, optimizer, mesh, root, checkpoints)
            _check_examples(before, place)
            rows.seek(before["examples"])
            if is_main():
                print(f"resumed {workdir} at step {int(state.step)}", flush=True)
            _check_features(config, state, root, resumed)

        # --- The loop -----------------------------------------------------------------------------
        writer = MetricWriter(root, int(state.step))
        opened.callback(writer.close)
        trace = Profile(root, profile)
        opened.callback(trace.close)
        preemption = opened.enter_context(Preemption())
        # Fetched once: a rate computed between two steps would wait for the step that runs.
        rates = np.asarray(schedule(np.arange(config.train.steps)))
        batches = Ahead(
            (make_batch(each, config, processor) for each in rows),
            put=lambda batch: shard_batch(batch, mesh),
            place=lambda: rows.examples,
        )
        opened.callback(batches.close)  # before its reader

        def answer(state: TrainState) -> dict:
            with preemption.at_once():  # nothing would be lost
                answerer = make_answerer(config, state.params, processor)
                results = evaluate(config, answerer, tested, root, task_of(config))
            for name, result in results["policies"].items():
                if result["accuracy"] is not None:
                    scalars = {f"eval/{name}/accuracy": result["accuracy"]}
                    writer.write(int(state.step), scalars)
            return results

        def stop(step: int, number: int) -> NoReturn:
            checkpoints.wait()
            print(f"stopped after step {step}; the same command goes on", flush=True)
            sys.exit(128 + number)

        callbacks = Callbacks(
            begin_step=trace.begin_step,
            log=lambda step, metrics: writer.write(
                step, metrics | {"learning_rate": float(rates[step - 1])}
            ),
            save=lambda state: checkpoints.save(state, {"examples": batches.place, **place}),
            check=checkpoints.check,
            wait=checkpoints.wait,
            evaluate=answer,
            newest=lambda: checkpoints.latest_step,
            asked=preemption.agreed,
            polled=preemption.polled,
            stop=stop,
        )
        state = train(
            state,
            batches,
            make_train_step(config.model, optimizer, config.seed, state, config.train.step),
            last=config.train.steps,
            mesh=mesh,
            every=Every(
                config.train.log_every,
                config.checkpoint.every,
                config.eval.every,
                config.checkpoint.keep_every,
            ),
            run=callbacks,
            waits=Waits(_remedy(config, workers)),
        )
        return answer(state) if at_the_end else {}


def make_batch(rows: dict, experiment: Experiment, processor: Processor) -> Batch:
    """Texts to ids. A clip that could not be read has no frame, and then no target either."""
    prompts = [experiment.data.ask(text) for text in rows["question"]]
    question, targets = processor.training(prompts, rows["answer"].tolist())
    targets = targets & rows["valid"].any(axis=1, keepdims=True)
    return Batch(rows["frames"], rows["valid"], rows["index"], question, targets)


def _remedy(config: Experiment, workers: int) -> str:
    """What makes reading faster."""
    if config.data.features:
        local = config.data.features_local
        disk = "" if local else ", set data.features_local to a fast disk of this machine"
        return f"put {config.data.features} on faster storage{disk}, or prepare it in int8"
    return (
        f"raise data.workers (now {workers}, -1: as many as suit the machine), store smaller "
        "videos, or compute features once: adacm2 prepare (docs/features.md)"
    )


def _check_length(root: pathlib.Path, config: Experiment) -> None:
    """A run may become longer, and shorter than it was meant to be, but not than it is."""
    newest = (saved_steps(root) or [0])[-1]
    if config.train.steps < newest:
        raise UserError(
            f"train.steps = {config.train.steps}, but {root} has taken {newest} steps; set it to "
            f"{newest} or more, or use another --workdir"
        )


def _free_base(root: pathlib.Path, init_from: str) -> tuple[str, ...]:
    """``init_from`` as a field that may change, where a base counts by its fingerprint: in a run
    that has steps (which are compared with it), or where this one is the same in another place."""
    link = read_link(root)
    same = link and read_base(init_from).get("fingerprint") == link["fingerprint"]
    return ("init_from",) if same or (link and saved_steps(root)) else ()


def _processor(config: Experiment, source: Any, root: pathlib.Path, resumed: bool) -> Processor:
    """The run's tokenizers: its own, the given ones, those of ``init_from``, or newly learned.

    Process 0 writes them where they are the run's own for all others.
    """
    if resumed or not is_main():
        return Processor.load(root, config.model)
    for directory in (config.tokenizers, config.init_from):
        if directory and (pathlib.Path(directory) / LLM_DIR).is_dir():
            processor = Processor.load(directory, config.model)
            processor.save(root)
            return processor
    if config.tokenizers or config.init_from:
        raise UserError(
            f"no tokenizers in {config.tokenizers or config.init_from}; set tokenizers to a "
            f"directory that holds {LLM_DIR}/"
        )
    texts = [text for example in source for text in (example.question, example.answer)]
    return train_tokenizers(texts, config.model, root)


def _start(config: Experiment, abstract: dict, optimizer: Any, mesh: Mesh) -> TrainState:
    """The state before the first step, with parameters of ``init_from`` or fresh ones."""
    if config.init_from:
        params = start_params(
            config.init_from, config.model, abstract, config.init_missing, config.seed
        )
    else:
        params = join_params(fresh_params(config.model, abstract, config.seed), {})
    return init_train_state(*split_params(params, config.optim.groups), optimizer, mesh)


def _check_features(
    config: Experiment, state: TrainState, root: pathlib.Path, resumed: bool
) -> None:
    """Refuses features of another ViT, and leaves no run behind that had not begun."""
    if not config.data.features:
        return
    try:
        check_weights(config.data.features, describe_vision(config.model, state.params))
    except UserError:
        if not resumed and is_main():
            (root / "config.json").unlink(missing_ok=True)
        raise


def _resume(
    config: Experiment,
    abstract: dict,
    optimizer: Any,
    mesh: Mesh,
    root: pathlib.Path,
    checkpoints: Checkpoints,
) -> tuple[TrainState, dict]:
    """The state of the run's newest checkpoint, each of its arrays read once, and the place in the
    data."""
    shapes = abstract_train_state(*split_params(abstract, config.optim.groups), optimizer, mesh)
    frozen = resume_frozen(root, abstract, shapes.frozen, config.init_from)
    return checkpoints.restore(shapes.replace(frozen=frozen))


def _check_examples(before: dict, now: dict) -> None:
    """The order of examples depends on their number, what they say on their source."""
    stored = before.get("of", now["of"])  # older versions did not note it
    if stored != now["of"]:
        raise UserError(
            f"there are {now['of']} training examples, but {stored} when the checkpoint was "
            "written: the run would repeat some and miss others. Bring the same data, or start "
            "another run from this one with init_from"
        )
    if before.get("source", now["source"]) != now["source"]:
        raise UserError(
            "the training examples are not those that the checkpoint was written with, though as "
            "many: lines were reordered, or questions, answers or parts of videos changed. Bring "
            "the same data, or start another run from this one with init_from"
        )
