"""One step of training: clips and questions in, the next state out."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from adacm2_jax.config import AdaCM2Config
from adacm2_jax.models.adacm2 import AdaCM2, Question, init_state
from adacm2_jax.optim import gradient_norms, merge_params


@struct.dataclass
class TrainState:
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


@struct.dataclass
class Batch:
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

    Differentiates through all frames. Where the ViT is frozen its features carry no gradient.
    """
    model = AdaCM2(config)
    variables = {"params": merge_params(learned, frozen)}
    features = model.apply(variables, batch.frames, method="encode_frames")
    state = init_state(config, batch.valid.sum(1), batch.seed)
    state = model.apply(
        variables,
        features,
        batch.valid,
        batch.question,
        state,
        deterministic=False,
        method="stream",
        rngs={"dropout": rng},
    )
    return model.apply(variables, state, batch.question, batch.targets, method="answer_loss")


def make_train_step(
    config: AdaCM2Config, optimizer: optax.GradientTransformation, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """Compiles the step; its state is donated.

    The metrics hold ``loss``, ``token_accuracy``, ``grad_norm`` and the norm of every part's
    gradient (``grad_norm/qformer`` …), so that a NaN can be traced to where it arose.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, accuracy), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            state.learned, state.frozen, batch, config, rng
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.learned)
        metrics = {
            "loss": loss,
            "token_accuracy": accuracy,
            "grad_norm": optax.global_norm(gradients),
        }
        for part, norm in gradient_norms(gradients).items():
            metrics[f"grad_norm/{part}"] = norm
        return (
            state.replace(
                step=state.step + 1,
                learned=optax.apply_updates(state.learned, updates),
                opt_state=opt_state,
            ),
            metrics,
        )

    return train_step


def first_nonfinite(metrics: dict) -> str | None:
    """The name of what is not finite: the parts' gradients first, then the loss; else None."""
    names = [name for name in metrics if name.startswith("grad_norm/")] + ["loss"]
    return next((name for name in names if not jnp.isfinite(metrics[name])), None)
