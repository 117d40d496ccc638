"""The arithmetic that a step needs, by the formulas of the networks: matrix products alone.

What rematerialisation computes a second time is no need; it has a figure of its own.
"""

import dataclasses
import re

from adacm2_jax.memory.policies import plan_for
from adacm2_jax.plan.steps import Plan


@dataclasses.dataclass(frozen=True)
class Need:
    """FLOPs of all devices together, two a multiplication.

    Attributes:
      flops: that the result cannot be had without, by part of the model.
      remat: that are computed again in the backward pass to spare memory.
    """

    flops: dict[str, float]
    remat: float

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(self.flops.values())


def need(plan: Plan) -> Need:
    """What a step needs.

    A frame passes through the ViT once. Attention counts in full where a mask hides half of it, and
    the language model reads every place that a text is padded to, as the program does. ``decode``
    writes ``max_new_tokens`` tokens.
    """
    return {"train": _train, "stream": _stream, "decode": _decode}[plan.step](plan)


def _stream(plan: Plan) -> Need:
    parts = {
        "vision": plan.batch * plan.frames * _vit(plan),
        "qformer": plan.batch * _watch(plan, plan.frames, plan.frames),
    }
    return Need(parts, 0.0)


def _decode(plan: Plan) -> Need:
    c, g = plan.model, plan.generation
    prompt = c.qformer.num_queries + c.max_text_len
    length = prompt + g.max_new_tokens - 1
    layers, attention = _llm(plan, prompt, length)
    step, seen = _llm(plan, 1, length)
    logits = 2.0 * c.llm.width * c.llm.vocab_size
    steps = (g.max_new_tokens - 1) * g.num_beams
    each = _projection(plan) + layers + attention + logits
    return Need({"llm": plan.batch * (each + steps * (step + seen + logits))}, 0.0)


def _train(plan: Plan) -> Need:
    c, batch = plan.model, plan.batch
    learns = _learning(plan)
    two_phase = plan.how.gradient == "two_phase" and plan.frames > 1
    vit = plan.frames * _vit(plan)
    if two_phase:
        slots = (
            0 if c.memory.policy == "merge" else plan_for(c).capacity + c.vision.tokens_per_frame
        )
        renewed = slots * c.qformer.num_cross_layers * _token(plan)
        last = _frame(plan) + renewed + _projection(plan)
        watched = _watch(plan, plan.frames - 1, 0)
    else:
        last = _watch(plan, plan.frames, 1) + _projection(plan)
        watched = 0.0
    places = c.qformer.num_queries + c.max_text_len + c.max_answer_len
    layers, attention = _llm(plan, places, places)
    logits = 2.0 * c.llm.width * c.llm.vocab_size * (c.max_text_len + c.max_answer_len)
    # A product has two gradients: of its input, and of its weight where that learns.
    llm = layers * (3 if learns("llm") else 2) + attention * 3
    llm += logits * (3 if learns("llm/lm_head") else 2)
    parts = {
        "vision": batch * vit * (3 if learns("vision") else 1),
        "qformer": batch * (watched + last * 3),
        "llm": batch * llm,
    }
    # The last product of a layer is not computed again: its own result has no part in a gradient.
    down = 2.0 * places * c.llm.depth * c.llm.width * c.llm.mlp_width
    remat = batch * (layers - down + attention + last - _projection(plan)) if c.remat else 0.0
    if c.remat and learns("vision"):
        remat += batch * vit
    return Need(parts, remat)


def _learning(plan: Plan):
    """Whether any parameter under a prefix learns, by the groups of the optimiser."""
    names = {
        "vision": "vision/blocks/mlp/up/kernel",
        "llm": "llm/layers/gate/kernel",
        "llm/lm_head": "llm/lm_head/kernel",
    }

    def learns(prefix: str) -> bool:
        found = [rate for pattern, rate in plan.groups if re.fullmatch(pattern, names[prefix])]
        return bool(found) and found[0] is not None

    return learns


def _vit(plan: Plan) -> float:
    """One frame."""
    v = plan.model.vision
    tokens = v.tokens_per_frame
    embed = 2.0 * (tokens - 1) * v.patch_size**2 * 3 * v.width
    block = tokens * (8.0 * v.width**2 + 4.0 * v.width * v.mlp_width) + 4.0 * tokens**2 * v.width
    return embed + v.depth * block


def _token(plan: Plan) -> float:
    """Key and value of one visual token in one layer."""
    return 4.0 * plan.model.vision.width * plan.model.qformer.width


def _watch(plan: Plan, frames: int, wanted: int) -> float:
    """The Q-Former on frames of one video; ``wanted`` of them have their query rows read, if
    nothing else than these needs any."""
    c = plan.model
    layers, tokens = c.qformer.num_cross_layers, c.vision.tokens_per_frame
    if c.memory.policy == "merge":
        return frames * _frame(plan)
    counts = plan_for(c)
    projected = frames * tokens * layers * _token(plan)
    if counts.ranking == "attention" and counts.older.any():
        return projected + frames * (_frame(plan) - tokens * layers * _token(plan))
    return projected + min(wanted, 1) * (_frame(plan) - tokens * layers * _token(plan))


def _frame(plan: Plan) -> float:
    """The Q-Former on one frame, the projection of the frame's own tokens included."""
    c, q = plan.model, plan.model.qformer
    tokens, rows = c.vision.tokens_per_frame, q.num_queries + c.max_text_len
    width = q.width
    if c.memory.policy == "merge":
        keys = (c.memory.bank_frames + 1) * tokens
        context = (c.memory.bank_frames + 1) * rows
        projected = keys
    else:
        keys, context, projected = plan_for(c).capacity + tokens, rows, tokens
    own = 4.0 * (rows + context) * width**2 + 4.0 * rows * context * width
    ffn = 4.0 * rows * width * q.mlp_width
    cross = 4.0 * q.num_queries * width**2 + 4.0 * q.num_queries * keys * width
    cross += projected * _token(plan)
    return q.depth * (own + ffn) + q.num_cross_layers * cross


def _projection(plan: Plan) -> float:
    c = plan.model
    return 2.0 * c.qformer.num_queries * c.qformer.width * c.llm.width


def _llm(plan: Plan, places: int, keys: int) -> tuple[float, float]:
    """Weights and attention of one sequence of ``places`` that sees ``keys``."""
    c = plan.model.llm
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    weights = c.width * (2 * heads + 2 * kv + 3 * c.mlp_width)
    return 2.0 * places * c.depth * weights, 4.0 * places * keys * heads * c.depth
