"""A small ViT that learns from single labelled images, in place of a pretrained one.

AdaCM² reads frames through a frozen ViT. For EVA ViT-g there are published weights; for a model of
another size there are none. Here every token of an image learns to name what the image shows, for
whichever tokens a memory keeps, they must say it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from adacm2_jax.config import VisionConfig
from adacm2_jax.errors import UserError
from adacm2_jax.models.vit import VisionTransformer, normalise
from adacm2_jax.progress import Progress, compiling
from adacm2_jax.training.optim import make_optimizer

#: uint8[B, height, width, 3] and, for every kind of label, int[B].
LabelledImages = tuple[np.ndarray, Mapping[str, np.ndarray]]


class TokenClassifier(nn.Module):
    """The ViT and, for every kind of label, a linear head on each of its tokens.

    Called with uint8[B, height, width, 3], returns for every kind float32[B, P, classes].
    """

    config: VisionConfig
    classes: Mapping[str, int]

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        tokens = VisionTransformer(self.config, remat=False, name="vision")(normalise(images))
        tokens = nn.LayerNorm(name="norm")(tokens)
        return {kind: nn.Dense(count, name=kind)(tokens) for kind, count in self.classes.items()}


def pretrain_vision(
    config: VisionConfig,
    batches: Iterator[LabelledImages],
    classes: Mapping[str, int],
    *,
    steps: int,
    learning_rate: float,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Trains the ViT on one device, in float32.

    Args:
      config: of the ViT.
      batches: so many batches as steps, or more; all of one size.
      classes: kind of label → how many labels there are.
      steps: how many.
      learning_rate: the highest; see ``optim.make_optimizer``.
      seed: of the first parameters.

    Returns:
      The ViT's parameters by path, ``vision/…``, as ``init_from`` takes them.

    Raises:
      UserError: if the loss is not finite in the end.
    """
    model = TokenClassifier(config, dict(classes))
    images, labels = next(batches)

    @jax.jit
    def init() -> dict[str, jax.Array]:
        params = nn.unbox(model.init(jax.random.key(seed), images[:1]))["params"]
        return traverse_util.flatten_dict(params, sep="/")

    params = init()
    optimizer, _ = make_optimizer(
        params,
        groups=((".*", 1.0),),
        learning_rate=learning_rate,
        steps=steps,
        warmup_steps=min(50, steps // 4),
        weight_decay=0.05,
        b1=0.9,
        b2=0.999,
        clip_norm=1.0,
    )

    def loss_of(params: dict, images: jax.Array, labels: dict) -> tuple[jax.Array, jax.Array]:
        tree = traverse_util.unflatten_dict(params, sep="/")
        losses, hits = [], []
        found: Any = model.apply({"params": tree}, images)
        for kind, logits in found.items():
            wanted = jnp.broadcast_to(labels[kind][:, None], logits.shape[:2])
            losses.append(optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean())
            hits.append(logits.argmax(-1) == wanted)
        return sum(losses, jnp.float32(0)), jnp.all(jnp.stack(hits), 0).mean()

    @jax.jit
    def step(params: dict, state: optax.OptState, images: jax.Array, labels: dict):
        (loss, accuracy), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            params, images, labels
        )
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss, accuracy

    state = optimizer.init(params)
    with Progress("pretrain the ViT", steps, unit="steps") as progress:
        with compiling("the pretraining step"):
            params, state, loss, accuracy = step(params, state, images, labels)
            jax.block_until_ready(loss)
        progress.update()
        for _ in range(1, steps):
            before = loss, accuracy
            params, state, loss, accuracy = step(params, state, *next(batches))
            # Of the step before, so that this one need not be waited for.
            progress.update(loss=float(before[0]), accuracy=float(before[1]))
    if not np.isfinite(loss):
        raise UserError(f"pretraining ended with loss {loss}; lower its learning rate")
    return {path: np.asarray(value) for path, value in params.items() if path.startswith("vision/")}
