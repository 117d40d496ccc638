"""MA-LMM's memory: nothing is dropped, what resembles its successor is merged with it.

Policy ``merge`` (MA-LMM, arXiv 2404.05726, Sec. 3.2): a baseline, and what makes MA-LMM's own
checkpoints answer with the memory that they were trained with. A bank holds M frames of R rows,
oldest first. A new frame is appended; if M + 1 are held then, every row position by itself finds
the two temporally adjacent entries of the highest cosine similarity and makes them one: their mean,
weighted by how many frames each of them stands for.

There is one bank of visual tokens, which all cross-attention layers read (each projects it anew),
and one bank for every self-attention layer, of the hidden states that came into it: query rows and
text rows, padding included. So a row also reads what stood there at earlier frames.

Buffers have room for M + 1 frames: :func:`append` writes a frame to the first free place, the
layers read what is :func:`live`, and :func:`shrink` frees the last place again. Entries are float32
whatever the model computes in: what one frame adds to the mean of many would drown in bfloat16.

Gradients end in a bank: what it holds is a constant to the frames that follow. Unlike a token that
another policy keeps, a mean over frames has no finite set of features that it could be computed
from once more. With ``merge`` the gradient is that of the last frame's pass alone, as in MA-LMM.

Axes: B videos, M frames of a bank, R rows a frame, W their width, L groups of the Q-Former, G
self-attention layers in each.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from adacm2_jax.config import AdaCM2Config

#: A vector shorter than this counts as this long, as in PyTorch's cosine similarity.
EPSILON = 1e-8


class Bank(struct.PyTreeNode):
    """Up to M frames of R rows for B videos, and room for one more."""

    #: float32[…, B, M + 1, R, W]: oldest first; of no meaning from ``count`` on.
    entries: jax.Array
    #: int32[…, B, M + 1, R]: how many frames each entry is the mean of.
    sizes: jax.Array
    #: int32[…, B]: how many frames are held.
    count: jax.Array


class BankMemory(struct.PyTreeNode):
    """All banks of a Q-Former: the memory of policy ``merge``, beside ``slots.VideoMemory``."""

    #: its rows are the P visual tokens of a frame.
    visual: Bank
    #: leaves [L, G, B, …]; its rows are those of the joint sequence, queries first.
    hidden: Bank

    @staticmethod
    def check(config: AdaCM2Config) -> None:
        """Every bank has its bound: it holds ``bank_frames`` frames."""

    @classmethod
    def empty(cls, config: AdaCM2Config, batch: int) -> "BankMemory":
        """Before the first frame of B = ``batch`` videos."""
        q, vision, frames = config.qformer, config.vision, config.memory.bank_frames
        layers = (q.num_cross_layers, q.cross_attention_every)
        rows = q.num_queries + config.max_text_len
        return cls(
            visual=init_bank((batch,), frames, vision.tokens_per_frame, vision.width),
            hidden=init_bank((*layers, batch), frames, rows, q.width),
        )

    def specs(self) -> Any:
        """A ``PartitionSpec`` for every leaf: divided over ``data``, by its videos."""
        return BankMemory(
            visual=jax.tree.map(lambda _: PartitionSpec("data"), self.visual),
            hidden=jax.tree.map(lambda _: PartitionSpec(None, None, "data"), self.hidden),
        )

    @property
    def tokens_kept(self) -> jax.Array:
        """int32[B]: how many visual tokens are held."""
        return self.visual.count * self.visual.sizes.shape[-1]

    def sources(self, config: AdaCM2Config) -> tuple[jax.Array, jax.Array]:
        """Twice int32[0, B, 0]: a mean is of many frames, so it comes from none."""
        none = jnp.zeros((0, *self.visual.count.shape, 0), jnp.int32)
        return none, none

    def in_time_order(self) -> dict[str, jax.Array]:
        """As of ``VideoMemory``, for no layers and no tokens; leaves [0, B, 0]."""
        none = jnp.zeros((0, *self.visual.count.shape, 0), jnp.int32)
        return dict(frame=none, patch=none, score=none.astype(jnp.float32), live=none > 0)


def init_bank(lead: tuple[int, ...], frames: int, rows: int, width: int) -> Bank:
    """An empty bank of M = ``frames``; ``lead`` are the sizes of its axes up to B."""
    return Bank(
        entries=jnp.zeros((*lead, frames + 1, rows, width), jnp.float32),
        sizes=jnp.zeros((*lead, frames + 1, rows), jnp.int32),
        count=jnp.zeros(lead, jnp.int32),
    )


def append(bank: Bank, rows: jax.Array, valid: jax.Array) -> Bank:
    """Writes a frame behind those held, with sizes of 1.

    Args:
      bank: of at most M frames.
      rows: [B, R, W].
      valid: bool[B]; where false the frame is padding and nothing is written.
    """
    place = jnp.arange(bank.sizes.shape[1])
    here = (place == bank.count[:, None]) & valid[:, None]
    return Bank(
        entries=jnp.where(
            here[..., None, None], rows[:, None].astype(bank.entries.dtype), bank.entries
        ),
        sizes=jnp.where(here[..., None], 1, bank.sizes),
        count=bank.count + valid,
    )


def live(bank: Bank) -> jax.Array:
    """bool[B, M + 1]: which frames are held."""
    return jnp.arange(bank.sizes.shape[1]) < bank.count[:, None]


def shrink(bank: Bank) -> Bank:
    """Makes M frames of M + 1 and leaves a bank of fewer as it is; ends gradients.

    Every row position chooses its own pair, among equals the oldest.
    """
    bank = jax.lax.stop_gradient(bank)
    left, right = bank.entries[:, :-1], bank.entries[:, 1:]
    length = jnp.maximum(jnp.linalg.norm(bank.entries, axis=-1), EPSILON)
    similarity = (left * right).sum(-1) / (length[:, :-1] * length[:, 1:])
    chosen = similarity.argmax(axis=1)[:, None, :, None]
    place = jnp.arange(similarity.shape[1])[:, None, None]

    size, next_size = bank.sizes[:, :-1, :, None], bank.sizes[:, 1:, :, None]
    total = size + next_size
    mean = (size * left + next_size * right) / jnp.maximum(total, 1)

    full = (bank.count == bank.sizes.shape[1])[:, None, None, None]

    def close_up(left, pair, right):
        """What stands before the pair stays, the pair becomes one, what is behind moves up."""
        new = jnp.where(place < chosen, left, jnp.where(place == chosen, pair, right))
        return jnp.where(full, new, left)

    return Bank(
        entries=bank.entries.at[:, :-1].set(close_up(left, mean, right)),
        sizes=bank.sizes.at[:, :-1].set(close_up(size, total, next_size)[..., 0]),
        count=jnp.minimum(bank.count, bank.sizes.shape[1] - 1),
    )
