"""The phases of a step and the arrays that are live in each, in bytes on one device.

How many copies of a few arrays the compiler holds is its own affair; these numbers, the constants
below, are fitted to XLA as of jax 0.10.2 and libtpu 0.0.42.1.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from adacm2_jax.memory.policies import layers_alike
from adacm2_jax.models.params import split_params
from adacm2_jax.plan.steps import Plan, device_bytes, plan_params, stream_state
from adacm2_jax.plan.topology import Topology

#: Copies of the beams' cache: on TPUs an old and a new one, as beams choose their parents anew at
#: every token; GPUs also turn the axes of (part of) the keys around.
_CACHES = {"tpu": 2.0, "cuda": 2.5}
#: Arrays of the size of all beams' logits: these, their log-probabilities, scores of candidates.
_BEAM_LOGITS = 3
#: Arrays in the memory dtype of a layer's keys and values, behind the gradient of both: of one its
#: own in float32 (2), and part of what that is made of.
_LAYER_GRADIENT = 2.5
#: Arrays of the size of the ViT's attention logits while a block runs backwards: probabilities and
#: their gradient, in float32 and in the narrow type.
_VIT_LOGITS = 3
#: Copies of all frames' keys and values that are held until the ViT has run backwards, of those in
#: the estimate's form: both and the gradients of both, by heads, padded.
_KEYS_AND_VALUES = 4


class Phases:
    """The arrays of a step on one device, in bytes: each step has a method that yields them by
    phase and then by name."""

    def __init__(self, plan: Plan, topology: Topology, mesh: Any):
        self.plan, self.mesh, c = plan, mesh, plan.model
        self.tiles = topology.chip.platform == "tpu"
        self.data, self.model = mesh.shape["data"], mesh.shape["model"]
        parts = plan.how.accumulate if plan.step == "train" else 1
        rows = plan.batch // parts
        self.rows = rows // self.data if rows % self.data == 0 else rows
        self.width = jnp.dtype(c.dtype).itemsize
        self.memory_width = jnp.dtype(c.memory_dtype).itemsize
        self.feature_width = jnp.dtype(c.feature_dtype).itemsize

    def array(self, width: int, *dims: int) -> float:
        """An array, on a TPU with its two minor axes padded to tiles."""
        sizes = list(dims)
        if self.tiles and len(sizes) > 1:
            sizes[-1] = -(-sizes[-1] // 128) * 128
            sizes[-2] = -(-sizes[-2] // 8) * 8
        return float(math.prod(sizes) * width)

    # The phases of each step.

    def stream(self) -> dict[str, dict[str, float]]:
        return self.reading(self.plan.frames, self.rows, self.cast())

    def decode(self) -> dict[str, dict[str, float]]:
        c, g = self.plan.model, self.plan.generation
        prompt = c.qformer.num_queries + c.max_text_len
        length = prompt + g.max_new_tokens - 1
        cache = 2 * self.cache(self.rows, length)
        beams = 2 * self.cache(self.rows * g.num_beams, length)
        copies = 1.0 if g.num_beams == 1 else _CACHES["tpu" if self.tiles else "cuda"]
        vocabulary = self.array(4, self.rows * g.num_beams, c.llm.vocab_size) / self.model
        return {
            "prefill": {"cache": cache, **self.llm_layer(self.rows, prompt, length)},
            "answer": {
                "cache": beams * copies,
                "logits": _BEAM_LOGITS * vocabulary,
                "head": self.head(),
                **self.llm_layer(self.rows * g.num_beams, 1, length),
            },
        }

    def train(self) -> dict[str, dict[str, float]]:
        how, frames = self.plan.how, self.plan.frames
        learned = float(self.learned())
        beside = self.cast()
        if how.accumulate > 1:
            # Sums of gradients beside those of one part, and the clips rearranged into parts.
            pixels = 3 * self.plan.model.vision.image_size**2
            clips = float(self.rows * how.accumulate * frames * pixels)
            beside |= {"gradient sums": learned, "clips": clips}
        if how.gradient == "two_phase" and frames > 1:
            phases, after = self.two_phase(beside, learned)
        else:
            kept = {"features": self.features(frames), **beside}
            phases = self.reading(frames, self.rows, kept)
            # Of every frame: the memory before it, and its own tokens with their gradients.
            keys = phases["Q-Former"]["keys and values"]
            backward = self.vit_backward(frames * self.rows) if self.vit_learned() else {}
            after = kept | {
                "memories": frames * self.state_bytes(),
                "keys and values": 2 * keys,
                "normalised": 2 * 4 * self.features(frames) / self.feature_width,
            }
            if backward:
                stays = {name: backward[name] for name in ("ViT, cast", "ViT, kept")}
                phases = {name: terms | stays for name, terms in phases.items()}
                after |= stays
                phases["ViT, backward"] = kept | {
                    **backward,
                    "gradients": learned,
                    "keys and values": _KEYS_AND_VALUES * keys,
                    "features": (1 + 4 / self.feature_width) * self.features(frames),
                }
        return phases | self.answering(after, learned) | {"optimiser": {"gradients": learned}}

    # The parts of training.

    def two_phase(
        self, beside: dict[str, float], learned: float
    ) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """The phases of the memory, and what is kept of it while the language model runs."""
        chunk = min(self.plan.how.chunk, self.plan.frames)
        kept = {"watched": self.watched(), **self.ahead(), **beside}
        phases = self.reading(chunk, self.rows, kept)
        phases["Q-Former, backward"] = {
            **self.renewal(),
            **beside,
            "gradients": learned + self.pairs(),
            "layer": _LAYER_GRADIENT * self.pairs() / self.plan.model.qformer.num_cross_layers,
        }
        if self.tiles:
            features = self.remembered()
            phases["renewal, backward"] = {
                **beside,
                "gradients": learned + 2 * self.pairs(),
                # In float32: normalised, with the two temporal embeddings between which they lie,
                # and their gradients.
                "features": features + 5 * 4 * features / self.feature_width,
            }
        return phases, {**self.renewed(), **beside}

    def answering(self, after: dict[str, float], learned: float) -> dict[str, dict[str, float]]:
        """The language model, beside what is kept of the memory."""
        c = self.plan.model
        places = c.qformer.num_queries + c.max_text_len + c.max_answer_len
        text = c.max_text_len + c.max_answer_len
        line = self.array(self.width, self.rows, places, c.llm.width)
        stored = {"residuals": c.llm.depth * (line if c.remat else self.llm_kept(places))}
        logits = self.array(4, self.rows * text, c.llm.vocab_size) / self.model
        layer = self.llm_layer(self.rows, places, places)
        if self.tiles:
            # A layer's weights for this round and, on their way, for the next; its activations and
            # their gradients.
            work = {name: 2 * size for name, size in layer.items()}
        else:
            work = layer | self.early(learned)
        return {
            "language model, logits": {
                **after,
                **stored,
                "logits": 2 * logits,
                "head": self.head(),
            },
            "language model, backward": {**after, **stored, **work},
        }

    # The parts of the phases.

    def llm_kept(self, places: int) -> float:
        """What a layer of the language model keeps without rematerialisation: its input, the sum in
        its middle and both normalised; queries, keys, values and what is attended; the gate, what
        passes it and their product; and probabilities."""
        c, rows = self.plan.model.llm, self.rows
        heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        divided = (
            2 * self.array(self.width, rows, places, heads)
            + 2 * self.array(self.width, rows, places, kv)
            + 3 * self.array(self.width, rows, places, c.mlp_width)
            + rows * c.num_heads * self.array(4, places, places)
        )
        return 4 * self.array(self.width, rows, places, c.width) + divided / self.model

    def vit_learned(self) -> float:
        """float32 bytes of what learns in the ViT."""
        learned, _ = split_params(plan_params(self.plan, self.mesh), self.plan.groups)
        return device_bytes([leaf for name, leaf in learned.items() if name.startswith("vision/")])

    def vit_backward(self, images: int) -> dict[str, float]:
        """A ViT that learns: its weights in the type that it computes in, what its blocks keep, and
        one block at work."""
        c, v = self.plan.model, self.plan.model.vision
        share, tokens = -(-images // self.model), v.tokens_per_frame
        residual = self.array(4, share, tokens, v.width)
        heads = self.array(self.width, share, v.num_heads, tokens, v.width // v.num_heads)
        logits = self.array(4, share, v.num_heads, tokens, tokens)
        kept = residual
        if not c.remat:
            # The sum in the middle too; both normalised; queries, keys, values and what is
            # attended; probabilities; before the GELU and after it.
            narrow = self.array(self.width, share, tokens, v.width)
            hidden = self.array(self.width, share, tokens, v.mlp_width)
            kept += residual + 2 * narrow + 4 * heads + logits + 2 * hidden
        cast = self.vit_learned() * self.width / 4 if self.width < 4 else 0.0
        return {
            # As in `cast`: on TPUs of all blocks at once.
            "ViT, cast": cast / (1 if self.tiles else v.depth),
            "ViT, kept": v.depth * kept,
            # The gradients of a block's input and output; queries, keys, values and theirs.
            "block": 2 * residual + 6 * heads + _VIT_LOGITS * logits,
        }

    def early(self, learned: float) -> dict[str, float]:
        """What GPUs hold already while the language model runs backwards: zeros to add gradients of
        the Q-Former's layers to, those of the memory too; and what leads back to the width of the
        model with its axes exchanged, of all layers, and queries, keys and values side by side."""
        c, q = self.plan.model.llm, self.plan.model.qformer
        heads = c.num_heads * c.head_dim
        turned = c.depth * c.width * (heads + c.mlp_width) / (self.data * self.model)
        zeros = max(0.0, learned - 4.0 * q.vocab_size * q.width) + self.pairs()
        side = c.width * (heads + 2 * c.num_kv_heads * c.head_dim) / self.model
        return {
            "zeros": zeros,
            "exchanged": self.width * turned if self.data > 1 else 0.0,
            "side by side": self.width * side,
        }

    def reading(self, frames: int, rows: int, kept: dict) -> dict[str, dict[str, float]]:
        """Frames through the ViT, then through the Q-Former."""
        c, v, q = self.plan.model, self.plan.model.vision, self.plan.model.qformer
        images, tokens = frames * rows, v.tokens_per_frame
        share = -(-images // self.model)
        residual = self.array(4, share, tokens, v.width)
        narrow = self.array(self.width, share, tokens, v.width)
        head = v.width // v.num_heads
        heads = self.array(self.width, share, v.num_heads, tokens, head)
        logits = self.array(4, share, v.num_heads, tokens, tokens)
        hidden = self.array(self.width, share, tokens, v.mlp_width)
        pixels = share * v.image_size**2 * 3 * (1 + self.width)
        features = self.features(frames)
        text = self.features(frames) if c.feature_dtype != c.memory_dtype else 0.0
        keys = 2 * q.num_cross_layers * images * self.array(self.memory_width, tokens, q.width)
        line = self.array(self.memory_width, images, q.num_queries + c.max_text_len, q.width)
        wide = self.array(self.memory_width, images, q.num_queries + c.max_text_len, q.mlp_width)
        memory, alive = self.live()
        working = self.working_state()
        return {
            "ViT, attention": {
                **kept,
                "residual": residual,
                "rows": narrow,
                "heads": 3 * heads,
                "logits": logits,
            },
            "ViT, MLP": {**kept, "pixels": pixels, "residual": 2 * residual, "hidden": 2 * hidden},
            "Q-Former": {
                **kept,
                **working,
                "features": features + text,
                "keys and values": keys,
                "rows": 4 * line + wide,
                "probabilities": (1 if self.tiles else 2)
                * (rows * q.num_heads * self.array(4, q.num_queries, alive)),
                **({"bank": memory} if c.memory.policy == "merge" else {}),
            },
        }

    def live(self) -> tuple[float, int]:
        """What policy merge projects anew for every frame, and the tokens that queries read."""
        c, q, tokens = (
            self.plan.model,
            self.plan.model.qformer,
            self.plan.model.vision.tokens_per_frame,
        )
        if c.memory.policy != "merge":
            shapes = stream_state(self.plan, self.mesh)
            return 0.0, shapes.memory.slots.shape[-1]
        held = (c.memory.bank_frames + 1) * tokens
        bank = self.rows * self.array(4, held, c.vision.width)
        keys = 2 * self.rows * self.array(self.memory_width, held, q.width)
        return 2 * bank + keys, held

    def working_state(self) -> dict[str, float]:
        """The compiler keeps a second memory while the first is read. TPUs keep it by heads and
        their width, padded to tiles."""
        c, q = self.plan.model, self.plan.model.qformer
        if c.memory.policy == "merge":
            return {}
        slots = stream_state(self.plan, self.mesh).memory.slots.shape[-1]
        head = self.array(self.memory_width, q.num_heads, q.width // q.num_heads)
        layer = 2 * self.rows * slots * head
        return {"memory, rewritten": layer * q.num_cross_layers}

    def watched(self) -> float:
        """What phase one of the gradient carries."""
        return self.state_bytes() + self.remembered() + self.features(1)

    def remembered(self) -> float:
        """The ViT's features of the tokens in the memory."""
        c = self.plan.model
        if c.memory.policy == "merge":
            return 0.0
        slots = stream_state(self.plan, self.mesh).memory.slots.shape
        layers = 1 if layers_alike(c) else slots[0]
        return layers * self.rows * self.array(self.feature_width, slots[2], c.vision.width)

    def pairs(self) -> float:
        """Keys and values in the memory."""
        c, q = self.plan.model, self.plan.model.qformer
        if c.memory.policy == "merge":
            return 0.0
        slots = stream_state(self.plan, self.mesh).memory.slots.shape
        heads = self.array(self.memory_width, q.num_heads, slots[2], q.width // q.num_heads)
        return 2 * slots[0] * self.rows * heads

    def ahead(self) -> dict[str, float]:
        """Zeros that GPUs make before the first frame, to add gradients of phase two to."""
        if self.tiles or self.plan.model.memory.policy == "merge":
            return {}
        pairs = 0.0 if layers_alike(self.plan.model) else 2 * self.pairs()
        return {"zeros ahead": 2 * self.remembered() + pairs}

    def renewed(self) -> dict[str, float]:
        """What phase two holds of the memory while the language model runs."""
        if self.tiles or self.plan.model.memory.policy == "merge":
            return {"watched": self.watched(), "renewed": self.state_bytes()}
        return self.renewal()

    def renewal(self) -> dict[str, float]:
        """Keys and values of the memory, and all that their gradients need."""
        kept = self.remembered()
        return {
            "newest": self.features(1),
            "renewed": self.pairs(),
            "renewed from": kept + 4 * kept / self.feature_width,
            "zeros ahead": 0.0 if self.tiles else 2 * kept,
        }

    def state_bytes(self) -> float:
        """Memory and query rows of this device's videos."""
        state = stream_state(self.plan, self.mesh)
        full = sum(
            self.array(jnp.dtype(leaf.dtype).itemsize, *leaf.shape)
            for leaf in jax.tree.leaves(state)
        )
        return full * self.rows / self.plan.batch

    def features(self, frames: int) -> float:
        v = self.plan.model.vision
        return self.rows * frames * self.array(self.feature_width, v.tokens_per_frame, v.width)

    def cast(self) -> dict[str, float]:
        """Weights of the Q-Former in the type that it computes in: on TPUs of all its layers at
        once, as XLA takes the conversion out of the loop over frames; elsewhere of one layer."""
        q, c = self.plan.model.qformer, self.plan.model
        if self.learned() == 0 or self.memory_width == 4:
            return {}
        layer = 4 * q.width**2 + 4 * q.width * q.mlp_width
        cross = 2 * q.width**2 + 2 * c.vision.width * q.width
        every = q.depth * layer + q.num_cross_layers * cross
        return {"weights cast": self.memory_width * every / (1 if self.tiles else q.depth)}

    def llm_layer(self, rows: int, places: int, keys: int) -> dict[str, float]:
        """One layer of the language model: its weights, gathered, and its activations."""
        c = self.plan.model.llm
        heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        weights = c.width * (2 * heads + 2 * kv + 3 * c.mlp_width) / self.model
        hidden = self.array(self.width, rows, places, c.mlp_width) / self.model
        line = self.array(self.width, rows, places, c.width)
        logits = rows * c.num_heads * self.array(4, places, keys) / self.model
        return {
            "layer": self.width * weights if self.data > 1 else 0.0,
            "activations": 2 * hidden + 4 * line + logits,
        }

    def head(self) -> float:
        """The output table, gathered."""
        c = self.plan.model.llm
        whole = self.array(self.width, c.width, c.vocab_size) / self.model
        return whole if self.data > 1 else 0.0

    def cache(self, rows: int, length: int) -> float:
        """Keys of all layers."""
        c = self.plan.model.llm
        heads = -(-c.num_kv_heads // self.model)
        return c.depth * rows * length * self.array(self.width, heads, c.head_dim)

    def learned(self) -> int:
        """float32 bytes of what learns."""
        return device_bytes(split_params(plan_params(self.plan, self.mesh), self.plan.groups)[0])
