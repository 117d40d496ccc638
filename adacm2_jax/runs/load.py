"""What a model starts from or answers with: a run of ``train.py``, or a converted checkpoint."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from adacm2_jax.config import AdaCM2Config, from_dict, to_dict
from adacm2_jax.distributed import connect
from adacm2_jax.errors import UserError, check_kind
from adacm2_jax.inference.answerer import Answerer
from adacm2_jax.inference.encoder import fingerprint
from adacm2_jax.inference.model import VideoModel
from adacm2_jax.inference.processor import Processor
from adacm2_jax.inference.session import SessionModel
from adacm2_jax.memory.policies import newest_instead
from adacm2_jax.models.params import abstract_params, fresh_params, join_params, unstacked
from adacm2_jax.runs import experiment as experiments
from adacm2_jax.runs.checkpoint import find_params, restore_params
from adacm2_jax.runs.experiment import MAY_CHANGE, Experiment, check_same
from adacm2_jax.runs.workdir import (
    damaged,
    find_base,
    is_base,
    read_base,
    read_config,
    write_link,
)
from adacm2_jax.sharding import make_mesh
from adacm2_jax.video.room import check_room
from adacm2_jax.video.sampling import FEWER

#: How LAVIS asks InstructBLIP, for a converted checkpoint, which has no experiment of its own.
_AS_LAVIS: dict[str, Any] = {
    "init_missing": ("temporal_embed",),
    "data": {"prompt": "Question: {question} Short answer:"},
    "generation": {
        "num_beams": 5,
        "repetition_penalty": 1.5,
        "length_penalty": 0.0,
        "max_new_tokens": 10,
    },
}


def experiment_of(directory: str | os.PathLike) -> Experiment:
    """The experiment of a run; of a converted checkpoint, how LAVIS asks its model.

    Raises:
      UserError: if there is neither.
    """
    if is_base(directory):
        return _read_stored(directory, {"model": read_config(directory)["model"]} | _AS_LAVIS)
    return stored_experiment(directory)


def stored_experiment(directory: str | os.PathLike) -> Experiment:
    """What ``config.json`` of a run holds.

    Raises:
      UserError: if there is none, or it is damaged.
    """
    return _read_stored(directory, read_config(directory))


def _read_stored(directory: str | os.PathLike, values: dict) -> Experiment:
    try:
        return experiments.read(values)
    except UserError as error:
        raise damaged(f"{os.fspath(directory)}/config.json", str(error)) from None


def load(
    directory: str | os.PathLike,
    *,
    policy: str = "",
    memory: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    dtype: str = "",
    quantize: str = "",
    on_truncated: str = "",
    mesh: tuple[int, int] | None = None,
    compare: bool = False,
) -> VideoModel:
    """Opens a model that answers questions about videos.

    Its parameters are looked for here, and read when the first question can be answered.
    For example::

        model = adacm2_jax.load("runs/quickstart/main")
        reply = model.ask("clip.mp4", "which digit was on the red ground?")
        print(reply.answer, reply.moments)

    Args:
      directory: of a run of ``train.py``, or of a converted checkpoint (``adacm2 port``).
      policy: which memory; by default that of the run's evaluation.
      memory: other fields of ``config.MemoryConfig``, such as ``{"recent_ratio": "0.2"}``.
      generation: other fields of ``GenerationConfig``, such as ``{"num_beams": 5}``.
      dtype: of matrix products, ``float32`` or ``bfloat16``; by default the run's.
      quantize: how the language model's matrices are kept, ``int8`` or ``fp8``; by default as the
        run, or the converted checkpoint, has them.
      on_truncated: of a file that is cut short: ``error``, or ``use`` what could be read; by
        default the run's.
      mesh: devices along (data, model); by default the run's.
      compare: whether a memory of as many tokens that are always the newest reads the same frames:
        then its answers follow, under the name ``recent``.

    Raises:
      UserError: if there is no model, it is seen to be damaged, or a value cannot be used. Damaged
        values are found when they are read.
    """
    place = "the directory of a run or of a converted checkpoint"
    if not os.fspath(check_kind(directory, (str, os.PathLike), "directory", place)):
        raise UserError(f"directory is ''; give {place}")
    texts = dict(policy=policy, dtype=dtype, quantize=quantize, on_truncated=on_truncated)
    for name, text in texts.items():
        check_kind(text, str, name, "a text; '' for the run's own")
    for name, fields in (("memory", memory), ("generation", generation)):
        check_kind(fields or {}, dict, name, "a dictionary of fields, or None")
    if mesh is not None:
        sizes = "two whole numbers, such as (-1, 1)"
        if len(check_kind(mesh, (tuple, list), "mesh", sizes)) != 2:
            raise UserError(f"mesh is {mesh!r}; give {sizes}")
        for size in mesh:
            check_kind(size, int, "one of mesh", "a whole number")
    if dtype == "float64":
        raise UserError("dtype is 'float64', which is for proofs; use float32, bfloat16 or float16")
    experiment = experiment_of(directory)
    model = experiment.model
    changed = _replace(model.memory, "memory", memory or {})
    llm = dataclasses.replace(model.llm, quantize=quantize or model.llm.quantize)
    model = dataclasses.replace(model, memory=changed, dtype=dtype or model.dtype, llm=llm)
    options = _replace(experiment.generation, "generation", generation or {})
    policies = (policy,) if policy else experiment.eval.policies[:1]
    experiment = dataclasses.replace(
        experiment,
        model=model,
        generation=options,
        mesh=tuple(mesh or experiment.mesh),
        data=dataclasses.replace(
            experiment.data, on_truncated=on_truncated or experiment.data.on_truncated
        ),
        eval=dataclasses.replace(experiment.eval, policies=policies),
    )
    experiment.memories(frames=1)
    processor = Processor.load(pathlib.Path(directory), model)
    check_params(experiment, directory)
    return video_model(experiment, lambda: load_params(experiment, directory), processor, compare)


def video_model(
    experiment: Experiment,
    params: Callable[[], dict],
    processor: Processor,
    compare: bool = False,
) -> VideoModel:
    """The model of an experiment, to be asked about single videos.

    Args:
      experiment: its model, memories and generation count.
      params: called for the parameters when the first video has been opened.
      processor: the model's tokenizers.
      compare: see :func:`load`.
    """
    params = functools.cache(params)

    def sessions() -> SessionModel:
        memory = next(iter(experiment.memories(frames=1).values()))
        if memory.policy == "full":
            raise UserError(
                "policy 'full' keeps every token, and a session has no last frame: open the model "
                "with another, such as load(…, policy='adacm2')"
            )
        return SessionModel(
            config=dataclasses.replace(experiment.model, memory=memory),
            params=params(),
            processor=processor,
            generation=experiment.generation,
            ask_as=experiment.data.ask,
            chunk=experiment.eval.chunk,
            resize=experiment.data.resize,
            on_truncated=experiment.data.on_truncated,
            fingerprint=functools.cache(lambda: fingerprint(params())),
        )

    def answerer(frames: int) -> Answerer:
        _check_full(experiment, frames)  # before parameters are read
        return make_answerer(experiment, params(), processor, frames, compare)

    return VideoModel(
        answerer,
        processor,
        ask_as=experiment.data.ask,
        size=experiment.model.vision.image_size,
        chunk=experiment.eval.chunk,
        resize=experiment.data.resize,
        on_truncated=experiment.data.on_truncated,
        sessions=sessions,
    )


def make_answerer(
    experiment: Experiment,
    params: dict,
    processor: Processor,
    frames: int = 0,
    compare: bool = False,
) -> Answerer:
    """The compiled functions of an experiment under every policy of ``eval.policies``.

    Args:
      experiment: its model, memories and generation count.
      params: of the model.
      processor: its tokenizers.
      frames: of the longest video, where it is known; see ``Experiment.memories``.
      compare: see :func:`load`.
    """
    _check_full(experiment, frames)
    memories = experiment.memories(frames)
    if compare:
        first = next(iter(memories.values()))
        other = newest_instead(first, experiment.model.vision.tokens_per_frame)
        memories |= {"recent": other} if other else {}
    return Answerer(
        experiment.model,
        params,
        processor,
        memories,
        experiment.generation,
        experiment.seed,
    )


def _check_full(experiment: Experiment, frames: int) -> None:
    """Refuses a video of which policy ``full`` cannot hold every token; 0 frames: not known."""
    if not frames or "full" not in experiment.eval.policies:
        return
    config = experiment.model
    qformer, tokens = config.qformer, frames * config.vision.tokens_per_frame
    each = 2 * qformer.width * jnp.dtype(config.memory_dtype).itemsize  # a key and a value
    check_room(
        tokens * qformer.num_cross_layers * each,
        f"the {tokens:,} tokens of {frames:,} frames under policy 'full'",
        f"{FEWER}, or choose another policy",
    )


def load_params(experiment: Experiment, directory: str | os.PathLike) -> dict:
    """Parameters alone, as answering has them (``params.unstacked``), on this process's devices.

    Args:
      experiment: whose model they must fit.
      directory: of a run, whose parameters they are; of the converted checkpoint in its place;
        else those of ``init_from`` are read.

    Raises:
      UserError: if there are none, or they are another model's.
    """
    mesh = make_mesh(tuple(experiment.mesh))
    connect(mesh)
    abstract = abstract_params(experiment.model, experiment.optim.groups, mesh)
    source, apart = _start_of(experiment, directory), mesh.size == 1
    if source is None:
        step = experiment.eval.step or None
        found = restore_params(directory, abstract, step, base=experiment.init_from, apart=apart)
        return unstacked(join_params(found, {}), apart)
    params = start_params(
        source, experiment.model, abstract, experiment.init_missing, experiment.seed, apart
    )
    return unstacked(params, apart)


def check_params(experiment: Experiment, directory: str | os.PathLike) -> None:
    """Whether :func:`load_params` would find its parameters, without reading a value of them.

    Raises:
      UserError: if there are none, or they are another model's.
    """
    mesh = make_mesh(tuple(experiment.mesh))
    abstract = abstract_params(experiment.model, experiment.optim.groups, mesh)
    source = _start_of(experiment, directory)
    if source is None:
        step = experiment.eval.step or None
        find_params(directory, abstract, step, base=experiment.init_from)
    else:
        check_start(source, experiment.model, abstract, experiment.init_missing)


def _start_of(experiment: Experiment, directory: str | os.PathLike) -> str | os.PathLike | None:
    """What a model starts from that is no run of its own; None for a run."""
    if is_base(directory):
        return directory
    run = (pathlib.Path(directory) / "config.json").exists()
    return None if run or not experiment.init_from else experiment.init_from


def _replace(config: Any, name: str, values: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(config)}
    for field in values:
        if field not in known:
            raise UserError(f"{name}.{field} is unknown; known: {', '.join(sorted(known))}")
    given = {each: getattr(config, each) for each in known} | values
    return from_dict(given, type(config), f"{name}.")


def start_params(
    source: str | os.PathLike,
    config: AdaCM2Config,
    abstract: dict,
    missing: Sequence[str],
    seed: int,
    apart: bool = False,
) -> dict:
    """The parameter tree of ``source``; what it lacks is fresh.

    Args:
      source: a directory of ``train.py``, or a converted checkpoint.
      config: the model.
      abstract: its parameters as ``jax.ShapeDtypeStruct`` leaves with shardings.
      missing: regular expressions over the paths that may be fresh.
      seed: of what is fresh.
      apart: see ``checkpoint.restore_params``.

    Raises:
      UserError: as :func:`check_start` does, or if the checkpoint is damaged.
    """
    check_start(source, config, abstract, missing)
    found = restore_params(source, abstract, missing=missing, apart=apart)
    if base := read_base(source):
        print(f"base: {source}, fingerprint {base['fingerprint']}", flush=True)
    absent = sorted(set(traverse_util.flatten_dict(abstract, sep="/")) - set(found))
    if absent:
        print(f"not in {source}, starts fresh: {_in_short(absent)}", flush=True)
        found |= fresh_params(config, abstract, seed, absent)
    return join_params(found, {})


def _in_short(paths: Sequence[str]) -> str:
    """Parameters by name if they are few, else how many there are of which parts."""
    if len(paths) <= 5:
        return ", ".join(paths)
    parts = dict.fromkeys(path.partition("/")[0] for path in paths)
    return f"{len(paths)} parameters of {', '.join(parts)}"


def resume_frozen(
    workdir: str | os.PathLike, abstract: dict, paths: Collection[str], init_from: str = ""
) -> dict:
    """The frozen parameters of a run that goes on, by path; notes where its base is now.

    Args:
      workdir: of the run.
      abstract: as for :func:`start_params`; all of it must be there.
      paths: of the frozen parameters.
      init_from: where its base may be, see ``checkpoint.find_base``.

    Raises:
      UserError: if the checkpoint is damaged, or its base is not there.
    """
    frozen = restore_params(workdir, abstract, base=init_from, paths=paths)
    if base := find_base(workdir, init_from):
        write_link(workdir, base)
    return frozen


def check_start(
    source: str | os.PathLike, config: AdaCM2Config, abstract: dict, missing: Sequence[str]
) -> None:
    """Whether a model can start from ``source``, without reading a value of it.

    Raises:
      UserError: if it is another model, or lacks parameters that ``missing`` does not name.
    """
    check_base(source, config)
    find_params(source, abstract, missing=missing)


def check_base(source: str | os.PathLike, config: AdaCM2Config) -> None:
    """Compares a model with that of a converted checkpoint, whose shapes alone say too little:
    numbers of heads, epsilons and rotary frequencies count too.

    Raises:
      UserError: with a readable difference.
    """
    if is_base(source):
        stored = {"model": read_config(source)["model"]}
        check_same(stored, {"model": to_dict(config)}, source, MAY_CHANGE["start"])


def vision_params(
    source: str | os.PathLike,
    config: AdaCM2Config,
    abstract: dict,
    missing: Sequence[str],
    seed: int,
) -> dict:
    """The ViT's parameters alone, as training starts with them.

    Args:
      source: ``init_from`` of the experiment; empty for fresh ones.
      config: the model.
      abstract: its parameters as ``jax.ShapeDtypeStruct`` leaves with shardings.
      missing: regular expressions over the paths that ``source`` may lack.
      seed: of fresh ones.

    Returns:
      A tree with ``vision``.

    Raises:
      UserError: if ``source`` does not hold the model.
    """
    flat = traverse_util.flatten_dict(abstract, sep="/")
    wanted = [path for path in flat if path.startswith("vision/")]
    found: dict = {}
    if source:
        check_start(source, config, abstract, missing)
        found = restore_params(source, abstract, missing=missing, paths=wanted)
    absent = [path for path in wanted if path not in found]
    if absent:
        found |= fresh_params(config, abstract, seed, absent)
    return join_params(found, {})
