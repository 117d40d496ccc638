"""One step of training: clips and questions in, the next state out."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from adacm2_jax.config import AdaCM2Config
from adacm2_jax.models.adacm2 import AdaCM2, Question, call, init_state
from adacm2_jax.optim import gradient_norms, merge_params
from adacm2_jax.sharding import replicated


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
        return merge_params(self.learned, self.frozen)


def init_train_state(
    learned: dict, frozen: dict, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state before the first step, everything on the mesh.

    The optimiser's moments lie where their parameters do.
    """
    places = {path: leaf.sharding for path, leaf in learned.items()}
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, place: place,
        jax.eval_shape(optimizer.init, learned),
        places,
        transform_non_params=lambda _: replicated(mesh),
    )
    return TrainState(
        step=jax.device_put(np.int32(0), replicated(mesh)),
        learned=learned,
        frozen=frozen,
        opt_state=jax.jit(optimizer.init, out_shardings=moments)(learned),
    )


class Batch(struct.PyTreeNode):
    """Clips with questions and answers, ready for the device."""

    #: uint8[B, T, height, width, 3].
    frames: jax.Array
    #: bool[B, T]: false on padded frames.
    valid: jax.Array
    #: uint32[B]: of the videos, for the random policy.
    seed: jax.Array
    #: of ``Processor.training``.
    question: Question
    #: bool[B, S]: the answers' tokens; all false where a video could not be read.
    targets: jax.Array


def loss_fn(
    learned: dict, frozen: dict, batch: Batch, config: AdaCM2Config, rng: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The walk of one batch, from pixels to the loss; float32 scalars: loss and token accuracy.

    Differentiates through all frames, under policy ``merge`` through the last one alone. Where the
    ViT is frozen its features carry no gradient.
    """
    model = AdaCM2(config)
    params = merge_params(learned, frozen)
    features = call(model, params, "encode_frames", batch.frames)
    state = init_state(config, batch.valid.sum(1), batch.seed)
    chunk = (features, batch.valid, batch.question, state)
    state = call(model, params, "stream", *chunk, deterministic=False, rngs={"dropout": rng})
    return call(model, params, "answer_loss", state, batch.question, batch.targets)


def make_train_step(
    config: AdaCM2Config,
    optimizer: optax.GradientTransformation,
    seed: int,
    state: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """Compiles the step; its state is donated, and the next one lies where ``state`` does.

    The metrics hold ``loss``, ``token_accuracy``, ``grad_norm`` and the norm of every part's
    gradient (``grad_norm/qformer`` …). Where the loss or a gradient is not finite the state stays
    as it was, so that :func:`explain_nonfinite` can tell where that came from.
    """

    places = jax.tree.map(lambda leaf: leaf.sharding, state)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(places, None))
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, accuracy), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            state.learned, state.frozen, batch, config, rng
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
