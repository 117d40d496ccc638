"""The memory's step as three kernels for NVIDIA GPUs: what ``slots.read_frames`` computes.

As XLA compiles it, a frame costs a layer nearly thirty kernels of a few microseconds each, most of
them to move a few numbers (``make check-gpu-program`` counts). Here it costs three, written in
Pallas for Triton. A video's tokens stand in time order, the frame's behind the older ones, in tiles
that are dealt out to so many programs a head that the card is busy:

1. :func:`_measure`: largest logit and sum of exponentials of each row, over a program's tiles;
2. :func:`_attend`: the probabilities, from all programs' measures; what a program's tiles add to
   the attended values and, in time order, to its head's column sums; and it writes the frame's keys
   and values to the free slots, which nobody reads;
3. :func:`_retain`, one program a video: adds the heads' sums up, finds the score of the last token
   that stays, by its bits from the highest down, and permutes the slots.

The memory is changed where it lies; of the memory of all layers, too, so that none is cut out and
put back. Sums have another order than in ``slots.read_frame``, so scores agree within rounding, and
of two tokens with nearly the same score another one may stay. Where scores are equal the rule is
the same: the older one stays.

Nothing of this has a gradient. Axes: as in ``slots.py``, L in front in a memory of all layers;
G programs a head.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from adacm2_jax.memory.policies import ATTENTION
from adacm2_jax.memory.slots import Frames, Queries, Retention, VideoMemory
from adacm2_jax.memory.slots import read_frames as read_one_layer

#: Tokens of a tile.
_TILE = 64
#: A product of Triton has at least so many rows.
_FEWEST_ROWS = 16
#: Programs that keep a card busy: it has 132 multiprocessors.
_PROGRAMS = 128
#: Frames that follow one another in the program: the host starts a loop's kernels one by one.
_UNROLLED = 16
#: A slot that there is none of: where a mask lets nothing be written, and the interpreter, which
#: writes there what was there, must not meet another value.
_NOWHERE = 1 << 24
#: Three counts of fewer than 2 to that power stand in an int32.
_COUNT_BITS = 10
_LEAST = float(jnp.finfo(jnp.float32).min)


def fits(memory: VideoMemory, retention: Retention) -> bool:
    """Whether the kernels can do it: a rank by this frame's attention alone, each layer's own, and
    heads whose width is a power of two, from 16 on."""
    width = memory.key.shape[-1]
    mixed = retention.novelty or retention.decay or retention.shared
    by_attention = retention.ranking == ATTENTION and not mixed
    return by_attention and width >= _FEWEST_ROWS and width == pl.next_power_of_2(width)


def read_frames(
    memory: VideoMemory,
    retention: Retention,
    frames: Frames,
    queries: Queries,
    layer: int | None = None,
) -> tuple[jax.Array, VideoMemory]:
    """``slots.read_frames`` without dropout: by the kernels where the program is for an NVIDIA GPU
    and they can do it (:func:`fits`), else as XLA compiles it.

    Args:
      memory: of one layer; with ``layer`` of all, of which it changes that one.
      retention: likewise.
      frames: of a chunk, likewise.
      queries: their rows in that layer.
      layer: which, from 0.
    """
    given = memory, retention, frames, queries
    plainly = functools.partial(read_plainly, layer=layer)
    if not fits(memory, retention):
        return plainly(*given)
    kernels = functools.partial(by_kernels, layer=layer)
    return jax.lax.platform_dependent(*given, cuda=kernels, default=plainly)


def read_plainly(
    memory: VideoMemory,
    retention: Retention,
    frames: Frames,
    queries: Queries,
    layer: int | None = None,
    dropout: Callable | None = None,
) -> tuple[jax.Array, VideoMemory]:
    """:func:`read_frames` as XLA compiles it; ``dropout``: see ``slots.read_frames``."""
    if layer is None:
        return read_one_layer(memory, retention, frames, queries, dropout)
    own, counts = jax.tree.map(lambda leaf: leaf[layer], (memory, retention))
    frames = frames.replace(key=frames.key[layer], value=frames.value[layer])
    attended, own = read_one_layer(own, counts, frames, queries, dropout)
    return attended, jax.tree.map(lambda leaf, new: leaf.at[layer].set(new), memory, own)


def by_kernels(
    memory: VideoMemory,
    retention: Retention,
    frames: Frames,
    queries: Queries,
    layer: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, VideoMemory]:
    """The kernels themselves, for what :func:`fits`.

    Args:
      memory, retention, frames, queries, layer: see :func:`read_frames`.
      interpret: the kernels are interpreted, which every device can, slowly.
    """
    if layer is None:
        whole, counts = jax.tree.map(lambda leaf: leaf[None], (memory, retention))
        frames = frames.replace(key=frames.key[None], value=frames.value[None])
        attended, whole = by_kernels(whole, counts, frames, queries, 0, interpret)
        return attended, jax.tree.map(lambda leaf: leaf[0], whole)
    rows, weights = _rows(queries)
    dtype = memory.key.dtype
    frames = frames.replace(key=frames.key.astype(dtype), value=frames.value.astype(dtype))
    number, batch, heads, count, width = queries.rows.shape
    tiles = pl.cdiv(memory.slots.shape[2], _TILE)
    wanted = pl.next_power_of_2(pl.cdiv(_PROGRAMS, batch * heads))
    programs = min(wanted, pl.next_power_of_2(tiles))
    valid = frames.valid.astype(jnp.int32)
    shape = number, batch, heads, programs, count, width
    parts = jnp.zeros(shape, jnp.float32)

    def step(place, carry):
        memory, parts = carry
        at = place[None], jnp.full(1, layer, jnp.int32), valid
        measures = _call_measure(at, memory, frames, rows, programs, interpret)
        memory, parts, sums = _call_attend(
            at, memory, frames, rows, weights, measures, parts, interpret
        )
        return _call_retain(at, memory, retention, frames, sums, interpret), parts

    memory, parts = jax.lax.fori_loop(
        0, number, step, (memory, parts), unroll=min(number, _UNROLLED)
    )
    return parts.sum(3).astype(memory.value.dtype), memory


def _rows(queries: Queries) -> tuple[jax.Array, jax.Array]:
    """All rows, [F, B, H, a power of two, D], and what each counts in a score, float32[B, …]."""
    batch, count = queries.rows.shape[1], queries.rows.shape[3]
    rows, weights = queries.rows, jnp.ones((batch, count), jnp.float32)
    if queries.text is not None and queries.text_mask is not None:
        mask = queries.text_mask
        # Where nothing is asked no text row can score: the query rows do.
        counts = queries.rows_score | ~mask.any(1, keepdims=True)
        weights = jnp.broadcast_to(counts.astype(jnp.float32), (batch, count))
        rows = jnp.concatenate([rows, queries.text], axis=3)
        weights = jnp.concatenate([weights, mask.astype(jnp.float32)], axis=1)
    more = max(pl.next_power_of_2(rows.shape[3]), _FEWEST_ROWS) - rows.shape[3]
    rows = jnp.pad(rows, ((0, 0),) * 3 + ((0, more), (0, 0)))
    return rows, jnp.pad(weights, ((0, 0), (0, more)))


def _like(*leaves: jax.Array) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]


def _options(warps: int, interpret: bool) -> dict:
    return {
        "compiler_params": triton.CompilerParams(num_warps=warps, num_stages=2),
        "interpret": interpret,
    }


class _Tokens:
    """The tokens of one video in time order, as one head's program reads them."""

    def __init__(self, at, slots, length, key, new_key, programs: int):
        place, layer, _ = at
        self.frame, self.layer = place[0], layer[0]
        self.video, self.head = pl.program_id(0), pl.program_id(1)
        self.old, (tokens, width) = length[self.layer, self.video], new_key.shape[4:]
        self.count = self.old + tokens
        self._slots, self._across = slots, jnp.arange(width)
        each = pl.cdiv(pl.cdiv(slots.shape[2], _TILE), programs)
        self.first = pl.program_id(2) * each
        self.last = jnp.minimum(self.first + each, pl.cdiv(self.count, _TILE))
        self._keys = key, new_key

    def tile(self, number):
        """Of a tile: place in time, slot, whether it is one, whether it is of the new frame."""
        order = number * _TILE + jnp.arange(_TILE)
        live = order < self.count
        at = self.layer, self.video, order
        slot = triton.load(self._slots.at[at], mask=live, other=_NOWHERE)
        return order, slot, live, live & (order >= self.old)

    def take(self, kept, new, tile):
        """[tile, D]: of the older tokens what their slots hold, of the new ones what comes in."""
        order, slot, live, is_new = tile
        across = self._across[None]
        there = self.layer, self.video, self.head, slot[:, None], across
        place = (order - self.old)[:, None]
        here = self.layer, self.frame, self.video, self.head, place, across
        older = triton.load(kept.at[there], mask=(live & ~is_new)[:, None], other=0)
        return older + triton.load(new.at[here], mask=is_new[:, None], other=0)

    def logits(self, query, tile):
        """The tile's keys, and float32[rows, tile], the least number where there is no token."""
        keys = self.take(*self._keys, tile)
        product = _product(query, keys.T) * len(self._across) ** -0.5
        return keys, jnp.where(tile[2][None], product, _LEAST)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    """Added up in float32; float32 is not rounded to TF32."""
    wide = jnp.promote_types(left.dtype, right.dtype)
    return triton.dot(left.astype(wide), right.astype(wide), allow_tf32=False)


def _call_measure(at, memory, frames, rows, programs: int, interpret: bool):
    batch, heads = memory.key.shape[1:3]
    shape = jax.ShapeDtypeStruct((batch, heads, programs, rows.shape[3]), jnp.float32)
    return pl.pallas_call(
        functools.partial(_measure, programs=programs),
        out_shape=(shape, shape),
        grid=(batch, heads, programs),
        name="memory_measure",
        **_options(4, interpret),
    )(*at, memory.slots, memory.length, memory.key, frames.key, rows)


def _measure(*refs, programs: int):
    at, (slots, length, key, new_key, rows, most_out, total_out) = refs[:3], refs[3:]
    tokens = _Tokens(at, slots, length, key, new_key, programs)
    query = rows[tokens.frame, tokens.video, tokens.head]

    def read(number, carry):
        most, total = carry
        logits = tokens.logits(query, tokens.tile(number))[1]
        higher = jnp.maximum(most, logits.max(1))
        total = total * jnp.exp(most - higher) + jnp.exp(logits - higher[:, None]).sum(1)
        return higher, total

    start = jnp.full(len(query), _LEAST), jnp.zeros(len(query), jnp.float32)
    most, total = jax.lax.fori_loop(tokens.first, tokens.last, read, start)
    here = tokens.video, tokens.head, pl.program_id(2)
    most_out[here], total_out[here] = most, total


def _call_attend(at, memory, frames, rows, weights, measures, parts, interpret: bool):
    batch, heads, slots = memory.key.shape[1:4]
    programs = parts.shape[3]
    changed = memory.key, memory.value, parts
    sums = jax.ShapeDtypeStruct((batch, heads, slots), jnp.float32)
    key, value, parts, sums = pl.pallas_call(
        functools.partial(_attend, programs=programs),
        out_shape=(*_like(*changed), sums),
        grid=(batch, heads, programs),
        input_output_aliases={0: 0, 1: 1, 2: 2},
        name="memory_attend",
        **_options(4, interpret),
    )(
        *(*changed, *at, memory.slots, memory.length),
        *(frames.key, frames.value, rows, weights, *measures),
    )
    return memory.replace(key=key, value=value), parts, sums


def _attend(*refs, programs: int):
    at, (slots, length, new_key, new_value, rows, weights, most, total) = refs[3:6], refs[6:14]
    key, value, parts, sums = refs[14:]
    tokens = _Tokens(at, slots, length, key, new_key, programs)
    layer, frame, video, head = tokens.layer, tokens.frame, tokens.video, tokens.head
    query, counts = rows[frame, video, head], weights[video]
    is_real = at[2][frame, video] > 0
    across = jnp.arange(query.shape[1])
    measured = most[video, head]
    highest = measured.max(0)
    whole = (total[video, head] * jnp.exp(measured - highest[None])).sum(0)

    def read(number, attended):
        tile = order, slot, live, is_new = tokens.tile(number)
        keys, logits = tokens.logits(query, tile)
        values = tokens.take(value, new_value, tile)
        written = is_new & is_real
        free = layer, video, head, jnp.where(written, slot, _NOWHERE)[:, None], across[None]
        triton.store(key.at[free], keys, mask=written[:, None])
        triton.store(value.at[free], values, mask=written[:, None])
        probs = jnp.exp(logits - highest[:, None]) / whole[:, None]
        scored = (probs * counts[:, None]).sum(0)
        triton.store(sums.at[video, head, order], scored, mask=live)
        return attended + _product(probs.astype(values.dtype), values)

    attended = jnp.zeros(query.shape, jnp.float32)
    attended = jax.lax.fori_loop(tokens.first, tokens.last, read, attended)
    row = jnp.arange(len(query))
    wanted = row < parts.shape[4]
    here = frame, video, head, pl.program_id(2), row[:, None], across[None]
    triton.store(parts.at[here], attended, mask=wanted[:, None])


def _call_retain(at, memory, retention, frames, sums, interpret: bool):
    changed = memory.score, memory.frame, memory.patch, memory.slots, memory.length
    score, frame, patch, slots, length = pl.pallas_call(
        functools.partial(_retain, tokens=frames.key.shape[4], interpret=interpret),
        out_shape=_like(*changed),
        grid=memory.length.shape[1:],
        input_output_aliases={i: i for i in range(len(changed))},
        name="memory_retain",
        **_options(4 if memory.slots.shape[2] <= 1024 else 8, interpret),
    )(*changed, *at, frames.index, retention.recent, retention.older, sums)
    return memory.replace(score=score, frame=frame, patch=patch, slots=slots, length=length)


def _nth_largest(values: jax.Array, count: jax.Array) -> jax.Array:
    """The largest number that ``count`` of the int32 ``values`` reach; 0 and more are counted.

    Bit by bit from the highest down. A sum over all threads is what takes the time, so two bits are
    found by one, where it has room for the counts of three candidates.
    """

    def reach(least: jax.Array) -> jax.Array:
        return (values >= least).astype(jnp.int32)

    def set_bit(step, bound):
        higher = bound | (jnp.int32(1) << (30 - step))
        return jnp.where(reach(higher).sum() >= count, higher, bound)

    def set_two_bits(step, bound):
        low = 28 - 2 * step
        one, two, three = (reach(bound | (jnp.int32(n) << low)) for n in (1, 2, 3))
        counts = (one + (two << _COUNT_BITS) + (three << 2 * _COUNT_BITS)).sum()
        reached = [counts >> n * _COUNT_BITS & (1 << _COUNT_BITS) - 1 for n in range(3)]
        digit = sum((number >= count).astype(jnp.int32) for number in reached)
        return bound | (digit << low)

    if len(values) >= 1 << _COUNT_BITS:
        return jax.lax.fori_loop(0, 31, set_bit, jnp.int32(0))
    return jax.lax.fori_loop(0, 15, set_two_bits, set_bit(0, jnp.int32(0)))


def _retain(*refs, tokens: int, interpret: bool):
    (place, layer, valid), (index, recent_of, older_of, sums) = refs[5:8], refs[8:12]
    score, frame, patch, slots, length = refs[12:]
    video, now, layer = pl.program_id(0), place[0], layer[0]
    heads, total = sums.shape[1:]
    order = jnp.arange(pl.next_power_of_2(total))
    inside, is_real = order < total, valid[now, video] > 0
    old = length[layer, video]
    count = old + tokens
    recent, older = recent_of[layer, count], older_of[layer, count]
    live, candidate = order < count, order < count - recent

    def add(head, found):
        return found + triton.load(sums.at[video, head, order], mask=live, other=0.0)

    ranked = jax.lax.fori_loop(0, heads, add, jnp.zeros(order.shape, jnp.float32))
    # Of numbers from 0 on the bits, read as an integer, stand in the numbers' order.
    bits = jnp.where(candidate, jax.lax.bitcast_convert_type(ranked, jnp.int32), -1)

    bound = _nth_largest(bits, older)
    above, equal = bits > bound, (bits == bound).astype(jnp.int32)
    room = older - above.astype(jnp.int32).sum()
    is_chosen = above | ((equal > 0) & (jnp.cumsum(equal) <= room))
    keep = ((is_chosen & (older > 0)) | (live & ~candidate)).astype(jnp.int32)
    first, kept = jnp.cumsum(keep), recent + older
    to = jnp.where(keep > 0, first - 1, kept + order - first)

    slot = triton.load(slots.at[layer, video, order], mask=inside, other=_NOWHERE)
    if not interpret:
        triton.debug_barrier()  # all have read before one writes
    written = inside & is_real
    triton.store(slots.at[layer, video, jnp.where(written, to, _NOWHERE)], slot, mask=written)
    triton.store(score.at[layer, video, slot], jnp.where(live, ranked, 0.0), mask=written)
    new = live & (order >= old) & is_real
    slot = jnp.where(new, slot, _NOWHERE)
    triton.store(frame.at[layer, video, slot], jnp.full(order.shape, index[now, video]), mask=new)
    triton.store(patch.at[layer, video, slot], order - old, mask=new)
    length[layer, video] = jnp.where(is_real, kept, old)
