"""One step of training: clips and questions in, the next state out."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from adacm2_jax.config import AdaCM2Config
from adacm2_jax.errors import UserError
from adacm2_jax.models.adacm2 import AdaCM2, Question, call, init_state
from adacm2_jax.models.cuda import compiler_options
from adacm2_jax.models.params import join_params
from adacm2_jax.sharding import replicated
from adacm2_jax.training.optim import gradient_norms
from adacm2_jax.training.two_phase import read_all_but_last, read_last


class TrainState(struct.PyTreeNode):
    """All that changes in training, and the frozen parameters beside it."""

    #: int32: steps done.
    step: jax.Array
    #: {path: float32}: parameters that learn.
    learned: dict
    #: {path: array}: parameters that do not; never updated, not in the checkpoint's steps.
    frozen: dict
    #: of optax, over ``learned``.
    opt_state: optax.OptState

    @property
    def params(self) -> dict:
        """The whole parameter tree."""
        return join_params(self.learned, self.frozen)


def init_train_state(
    learned: dict, frozen: dict, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state before the first step, everything on the mesh.

    The optimiser's moments lie where their parameters do.
    """
    abstract = abstract_train_state(learned, frozen, optimizer, mesh)
    moments = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
    return TrainState(
        step=jax.device_put(np.int32(0), replicated(mesh)),
        learned=learned,
        frozen=frozen,
        opt_state=jax.jit(optimizer.init, out_shardings=moments)(learned),
    )


def abstract_train_state(
    learned: dict, frozen: dict, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The shapes of :func:`init_train_state`'s, with shardings; parameters may be shapes, too."""
    shapes = jax.eval_shape(optimizer.init, learned)
    places = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, place: place,
        shapes,
        {path: leaf.sharding for path, leaf in learned.items()},
        transform_non_params=lambda _: replicated(mesh),
    )

    def shape(leaf, place) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return TrainState(
        step=shape(jax.eval_shape(lambda: jnp.int32(0)), replicated(mesh)),
        learned={path: shape(leaf, leaf.sharding) for path, leaf in learned.items()},
        frozen={path: shape(leaf, leaf.sharding) for path, leaf in frozen.items()},
        opt_state=jax.tree.map(shape, shapes, places),
    )


class Batch(struct.PyTreeNode):
    """Clips with questions and answers, ready for the device."""

    #: uint8[B, T, height, width, 3]; or what the ViT makes of them, [B, T, P, V], as it is kept
    #: (``AdaCM2.encode_frames``).
    frames: jax.Array
    #: bool[B, T]: false on padded frames.
    valid: jax.Array
    #: uint32[B]: of the videos, for the random policy.
    seed: jax.Array
    #: of ``Processor.training``.
    question: Question
    #: bool[B, S]: the answers' tokens; all false where a video could not be read.
    targets: jax.Array


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step is computed; none of it changes what is computed, but dropout, ``detached``, and
    ``two_phase`` the gradient of a ViT that learns, which :func:`check_step` refuses.

    Attributes:
      gradient: ``two_phase`` (two_phase.py: exact, and activations do not grow with the clip; the
        ViT must be frozen), ``scan`` (differentiates through all frames) or ``detached`` (what the
        memory holds is constant, as MA-LMM's banks are: the gradient is that of the last frame
        alone, and not exact; for comparison).
      chunk: ``two_phase`` and ``detached``: frames that pass through the networks together.
      accumulate: parts of the batch that are computed one after the other.
    """

    gradient: str = "two_phase"
    chunk: int = 16
    accumulate: int = 1

    def __post_init__(self):
        known = "two_phase", "scan", "detached"
        if self.gradient not in known:
            raise UserError(
                f"train.gradient is {self.gradient!r}; it must be one of {', '.join(known)}"
            )
        for name in ("chunk", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} = {getattr(self, name)} must be at least 1")


def check_step(options: StepConfig, learned: Collection[str], num_frames: int) -> None:
    """Refuses what would not have the exact gradient.

    Args:
      options: of the step.
      learned: paths of the parameters that learn.
      num_frames: T, of a clip.

    Raises:
      UserError: where the ViT learns, a clip has more than one frame, and it is not ``scan``.
    """
    trained = sorted(path for path in learned if path.startswith("vision/"))
    if trained and num_frames > 1 and options.gradient != "scan":
        raise UserError(
            f"train.gradient = {options.gradient!r} needs a frozen ViT, but {trained[0]} learns on "
            f"clips of {num_frames} frames: features of earlier frames would be constants. Freeze "
            "vision/.* in optim.groups, train on single frames, or set train.gradient = 'scan'"
        )


def refuse_learning(learned: Collection[str]) -> None:
    """Refuses features where the ViT learns.

    Args:
      learned: paths of the parameters that learn.

    Raises:
      UserError: naming the first of them that is the ViT's.
    """
    trained = sorted(path for path in learned if path.startswith("vision/"))
    if trained:
        raise UserError(
            f"features are kept of a frozen ViT, but {trained[0]} learns: freeze vision/.* in "
            "optim.groups, or train from pixels (data.features empty)"
        )


def images_at_a_time(
    step: StepConfig, num_frames: int, batch_size: int, mesh: Mesh
) -> tuple[int, int, int]:
    """How the training step divides the frames of clips for the ViT.

    Args:
      step: of training.
      num_frames: T.
      batch_size: of training, over all devices.
      mesh: of training.

    Returns:
      How many frames of a clip stand in the first piece, images a device in the first piece, and in
      each of the following (1 where there is none).
    """
    rows = -(-batch_size // (mesh.shape["data"] * step.accumulate))
    whole = step.gradient == "scan" or num_frames == 1
    first = num_frames if whole else num_frames % step.chunk
    parts = 1 if whole else mesh.shape["model"]

    def images(frames: int) -> int:
        return max(1, -(-rows * frames // parts))

    return first, images(first), images(0 if first == num_frames else step.chunk)


def loss_fn(
    learned: dict,
    frozen: dict,
    batch: Batch,
    config: AdaCM2Config,
    rng: jax.Array,
    options: StepConfig,
    count: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The walk of one batch, from pixels to the loss; float32 scalars: loss and token accuracy.

    Args:
      learned, frozen: parameters by path.
      batch: clips and questions.
      config: the model.
      rng: for dropout.
      options: of the step.
      count: what sums over target tokens are divided by; by default their number.

    Raises:
      UserError: where the gradient would not be exact, see :func:`check_step`.
    """
    check_step(options, learned, batch.valid.shape[1])
    # The kernels of a fused memory have no gradient.
    model = AdaCM2(dataclasses.replace(config, fused_memory=False))
    params = join_params(learned, frozen)
    state = init_state(config, batch.valid.sum(1), batch.seed)
    dropout = dict(deterministic=False, rngs={"dropout": rng})
    clip = batch.frames, batch.valid, batch.question, state
    if options.gradient == "scan" or batch.valid.shape[1] == 1:
        features = call(model, params, "encode_frames", batch.frames)
        state = call(model, params, "read", features, *clip[1:], **dropout)
    else:
        renewable = read_all_but_last(model, params, *clip, options.chunk)
        renew = options.gradient == "two_phase"
        state = read_last(model, params, renewable, batch.question, renew, **dropout)
    return call(model, params, "answer_loss", state.queries, batch.question, batch.targets, count)


def loss_and_gradients(
    learned: dict,
    frozen: dict,
    batch: Batch,
    config: AdaCM2Config,
    rng: jax.Array,
    options: StepConfig,
) -> tuple[jax.Array, jax.Array, dict]:
    """:func:`loss_fn` with the gradients of ``learned``, over ``options.accumulate`` parts.

    Losses and gradients are sums over all target tokens of the batch divided by their number, as
    if it were one part; each part has a dropout mask of its own.
    """
    count = jnp.maximum(batch.targets.sum(), 1)
    differentiate = jax.value_and_grad(loss_fn, has_aux=True)

    def part(i: jax.Array | int, rows: Batch) -> tuple[jax.Array, jax.Array, dict]:
        own = jax.random.fold_in(rng, i)
        (loss, accuracy), gradients = differentiate(
            learned, frozen, rows, config, own, options, count
        )
        return loss, accuracy, gradients

    if options.accumulate == 1:
        return part(0, batch)
    # Every n-th row, so that all devices take part in every part without moving a row.
    parts = jax.tree.map(
        lambda leaf: leaf.reshape((-1, options.accumulate) + leaf.shape[1:]), batch
    )

    def add(total, i):
        rows = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, axis=1, keepdims=False), parts
        )
        return jax.tree.map(jnp.add, total, part(i, rows)), None

    zeros = jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, learned)
    return jax.lax.scan(add, zeros, jnp.arange(options.accumulate))[0]


def make_train_step(
    config: AdaCM2Config,
    optimizer: optax.GradientTransformation,
    seed: int,
    state: TrainState,
    options: StepConfig,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """Compiles the step; its state is donated, and the next one lies where ``state`` does.

    Args:
      config: the model.
      optimizer: of ``optim.make_optimizer``.
      seed: of dropout.
      state: or its shapes, with shardings.
      options: of the step; see :func:`check_step`.

    The metrics hold ``loss``, ``token_accuracy``, ``grad_norm`` and the norm of every part's
    gradient (``grad_norm/qformer`` …). Where the loss or a gradient is not finite the state stays
    as it was, so that :func:`explain_nonfinite` can tell where that came from.
    """

    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    given = dict(out_shardings=(places, None), compiler_options=compiler_options(config))

    @functools.partial(jax.jit, donate_argnums=0, **given)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, accuracy, gradients = loss_and_gradients(
            state.learned, state.frozen, batch, config, rng, options
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.learned)
        metrics = {
            "loss": loss,
            "token_accuracy": accuracy,
            "grad_norm": optax.tree.norm(gradients),
        }
        for part, norm in gradient_norms(gradients).items():
            metrics[f"grad_norm/{part}"] = norm
        learned = optax.apply_updates(state.learned, updates)
        good = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
        step, learned, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (state.step + 1, learned, opt_state),
            (state.step, state.learned, state.opt_state),
        )
        return state.replace(step=step, learned=learned, opt_state=opt_state), metrics

    return train_step


def explain_nonfinite(state: TrainState, metrics: dict) -> str | None:
    """Where NaN or infinity came from, for people; None if loss and gradients are finite.

    Args:
      state: after the step.
      metrics: of the step, on the host.
    """
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if not bad:
        return None
    parts = [name.removeprefix("grad_norm/") for name in bad if name.startswith("grad_norm/")]
    found = [] if math.isfinite(metrics["loss"]) else [f"the loss is {metrics['loss']}"]
    found += [f"the gradient of {', '.join(parts)} is not finite"] if parts else []
    largest = {
        path: float(jnp.abs(leaf).max()) for path, leaf in (state.frozen | state.learned).items()
    }
    damaged = [path for path, value in largest.items() if not math.isfinite(value)]
    if damaged:
        found.append(
            f"{len(damaged)} parameter(s) were not finite before, the first is {damaged[0]}"
        )
    else:
        path = max(largest, key=lambda path: largest[path])
        found.append(f"parameters were finite, the largest is {largest[path]:.3g} in {path}")
    return "; ".join(found)
