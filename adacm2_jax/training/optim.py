"""Which parameters learn, how fast, and by what rule."""

import re
from collections.abc import Sequence

import jax
import optax

from adacm2_jax.models.params import Group, group_of


def make_optimizer(
    learned: dict,
    *,
    groups: Sequence[Group],
    learning_rate: float,
    steps: int,
    warmup_steps: int,
    weight_decay: float,
    b1: float,
    b2: float,
    clip_norm: float,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with a linear warm-up, a cosine to zero, and gradients clipped by their global norm.

    Weight decay spares biases, norms and whatever else has fewer than two axes within a layer, as
    LAVIS does. Each group's updates are multiplied by its factor.

    Returns:
      The transformation over the flat dictionary of learned parameters, and the schedule.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(warmup_steps, steps - 1), max(steps, 2)
    )
    factors = {path: group_of(path, groups)[1] for path in learned}
    scale = {str(factor): optax.scale(factor) for factor in sorted(set(factors.values()), key=str)}
    decays = {path: not re.search(r"(bias|scale)$", path) for path in learned}
    rule = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays),
        optax.partition(scale, {path: str(factor) for path, factor in factors.items()}),
    )
    return rule, schedule


def gradient_norms(gradients: dict) -> dict[str, jax.Array]:
    """The norm of each top-level part (``qformer``, ``llm``, …): a NaN is traced by it."""
    parts = sorted({path.split("/")[0] for path in gradients})
    return {
        part: optax.tree.norm([g for path, g in gradients.items() if path.split("/")[0] == part])
        for part in parts
    }
