"""The three programs of an experiment, as shapes: nothing of them is computed here.

``train``: what ``train.py`` runs. ``stream``: a chunk of frames of ``eval.batch_size`` videos, one
question each, through the ViT and into the memory of ``model.memory.policy``. ``decode``: prompts
into the language model and answers out of it. The last two have all parameters as arguments, as
they lie in memory then, whether a program reads them or not.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adacm2_jax.config import AdaCM2Config
from adacm2_jax.errors import UserError
from adacm2_jax.inference.generate import GenerationConfig, generate
from adacm2_jax.inference.steps import encode, read
from adacm2_jax.models.adacm2 import (
    AdaCM2,
    Question,
    StreamState,
    init_state,
    state_specs,
)
from adacm2_jax.models.params import abstract_params, split_params, unstacked
from adacm2_jax.models.quantized import refuse_learning_quantized
from adacm2_jax.runs.experiment import Experiment
from adacm2_jax.sharding import replicated, rows_per_process
from adacm2_jax.training.optim import make_optimizer
from adacm2_jax.training.step import (
    Batch,
    StepConfig,
    abstract_train_state,
    check_step,
    make_train_step,
)

STEPS = ("train", "stream", "decode")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the planner must know of an experiment.

    Attributes:
      step: one of ``STEPS``.
      model: the model.
      groups: of the optimiser: what learns and what is frozen.
      optimizer: other arguments of ``make_optimizer``.
      batch: rows of a step, on all devices together.
      frames: T of a training clip, or F of a streamed chunk.
      options: of the training step.
      generation: how answers are decoded.
      stored: training reads features instead of pixels.
    """

    step: str
    model: AdaCM2Config
    groups: tuple
    optimizer: dict
    batch: int
    frames: int
    options: StepConfig
    generation: GenerationConfig
    stored: bool = False

    @property
    def keeping(self) -> "Plan":
        """The same step without rematerialisation."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, remat=False))


def make_plan(experiment: Experiment, step: str) -> Plan:
    """The plan of a step of an experiment.

    Raises:
      UserError: if there is no such step.
    """
    if step not in STEPS:
        raise UserError(f"--step {step}: must be one of {', '.join(STEPS)}, all")
    train, evaluation = experiment.train, experiment.eval
    optimizer = experiment.optim.rule
    return Plan(
        step=step,
        model=experiment.model,
        groups=optimizer.pop("groups"),
        optimizer=optimizer | {"steps": train.steps},
        batch=train.batch_size if step == "train" else evaluation.batch_size,
        frames=train.num_frames if step == "train" else evaluation.chunk,
        options=train.step,
        generation=experiment.generation,
    )


def trace(plan: Plan, mesh: Mesh) -> jax.stages.Traced:
    """The program as it is traced for the devices of ``mesh``.

    Raises:
      UserError: if plan and mesh do not fit together.
    """
    function, arguments = program(plan, mesh)
    with jax.set_mesh(mesh):
        return function.trace(*arguments)


def lower(traced: jax.stages.Traced, mesh: Mesh) -> jax.stages.Lowered:
    """What the compiler for these devices is given."""
    platform = mesh.devices.flat[0].platform.replace("gpu", "cuda")
    with jax.set_mesh(mesh):
        return traced.lower(lowering_platforms=(platform,))


def program(plan: Plan, mesh: Mesh) -> tuple[Any, tuple]:
    """The jitted function of a step and its arguments as shapes with shardings."""
    build: Callable = {"train": _train, "stream": _stream, "decode": _decode}[plan.step]
    return build(plan, mesh)


@functools.lru_cache(maxsize=8)
def _params(model: AdaCM2Config, groups: tuple, mesh: Mesh) -> dict:
    return abstract_params(model, groups, mesh)


def plan_params(plan: Plan, mesh: Mesh) -> dict:
    """The parameters as shapes with shardings; tracing a full-size model takes a second."""
    return _params(plan.model, plan.groups, mesh)


def params_bytes(plan: Plan, mesh: Mesh) -> int:
    """What the parameters alone need on a device."""
    return device_bytes(plan_params(plan, mesh))


def device_bytes(tree: Any) -> int:
    """What arrays with shardings (or their shapes) need on a device, without padding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _train(plan: Plan, mesh: Mesh) -> tuple[Any, tuple]:
    rows_per_process(plan.batch, mesh, plan.options.accumulate)
    abstract = plan_params(plan, mesh)
    learned, frozen = split_params(abstract, plan.groups)
    refuse_learning_quantized(learned)
    check_step(plan.options, learned, plan.frames)
    optimizer, _ = make_optimizer(learned, groups=plan.groups, **plan.optimizer)
    state = abstract_train_state(learned, frozen, optimizer, mesh)
    step = make_train_step(plan.model, optimizer, 0, state, plan.options)
    return step, (state, train_batch(plan, mesh))


def train_batch(plan: Plan, mesh: Mesh) -> Batch:
    """The shapes of a training batch."""
    rows = _rows(plan.batch, mesh)
    length = plan.model.max_text_len + plan.model.max_answer_len
    vision = plan.model.vision
    features = jnp.dtype(plan.model.feature_dtype), vision.tokens_per_frame, vision.width
    kind, *frame = features if plan.stored else (jnp.uint8, *_pixels(plan.model))
    return Batch(
        frames=rows(kind, plan.frames, *frame),
        valid=rows(bool, plan.frames),
        seed=rows(jnp.uint32),
        question=_question(plan, mesh, length),
        targets=rows(bool, length),
    )


def _stream(plan: Plan, mesh: Mesh) -> tuple[Any, tuple]:
    model, rows = AdaCM2(plan.model), _rows(plan.batch, mesh)

    def observe(params, frames, valid, question, state) -> StreamState:
        return read(model, params, encode(model, params, frames), valid, question, state)

    arguments = (
        unstacked(plan_params(plan, mesh), mesh.size == 1),
        rows(jnp.uint8, plan.frames, *_pixels(plan.model)),
        rows(bool, plan.frames),
        _question(plan, mesh, plan.model.max_text_len),
        stream_state(plan, mesh),
    )
    return jax.jit(observe, donate_argnums=4, keep_unused=True), arguments


def _decode(plan: Plan, mesh: Mesh) -> tuple[Any, tuple]:
    model = AdaCM2(plan.model)

    def answer(params, state, question):
        return generate(model, params, state.queries, question, plan.generation)

    arguments = (
        unstacked(plan_params(plan, mesh), mesh.size == 1),
        stream_state(plan, mesh),
        _question(plan, mesh, plan.model.max_text_len),
    )
    return jax.jit(answer, keep_unused=True), arguments


def stream_state(plan: Plan, mesh: Mesh) -> Any:
    """A ``StreamState`` of shapes: the memory and all else that a stream carries."""
    total = jax.ShapeDtypeStruct((plan.batch,), jnp.int32)
    shapes = jax.eval_shape(lambda total: init_state(plan.model, total), total)

    def place(leaf, spec) -> jax.ShapeDtypeStruct:
        spec = spec if plan.batch % mesh.shape["data"] == 0 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, shapes, state_specs(shapes))


def _question(plan: Plan, mesh: Mesh, length: int) -> Question:
    rows = _rows(plan.batch, mesh)
    text = plan.model.max_text_len
    return Question(
        rows(jnp.int32, text), rows(bool, text), rows(jnp.int32, length), rows(bool, length)
    )


def _rows(batch: int, mesh: Mesh) -> Callable[..., Any]:
    """Makes shapes whose axis 0 is the batch, divided over ``data`` where that is possible."""
    divides = batch % mesh.shape["data"] == 0
    place = NamedSharding(mesh, PartitionSpec("data")) if divides else replicated(mesh)
    return lambda dtype, *dims: jax.ShapeDtypeStruct((batch, *dims), dtype, sharding=place)


def _pixels(model: AdaCM2Config) -> tuple[int, int, int]:
    return model.vision.image_size, model.vision.image_size, 3
