"""Which tokens stay: every policy is a pair of counts and a way to rank the older tokens.

After a frame, ``n`` tokens of a layer are live. Each policy keeps the newest ``recent[n]`` of them
whole and, of the older ones, the ``older[n]`` that rank highest; all else is dropped. That one
mechanism (``slots.retain``) serves them all:

=============  ==================  ===============  ============================================
policy         recent[n]           older[n]         ranked by
=============  ==================  ===============  ============================================
adacm2         ⌊ρn⌋                ⌊β(n − ⌊ρn⌋)⌋    cross-attention that the token just received
full           min(n, capacity)    0                (the newest stay once max_frames are there)
recent         as many as adacm2   0                (the newest stay)
recent_frames  min(n, capacity)    0                (the newest stay: N − 1 frames)
uniform        0                   as many          an even stride over all tokens of the video
random         0                   as many          a random number drawn when the token arrives
budget         ⌊ρ·capacity⌋        the rest         cross-attention; all stay while n ≤ capacity
=============  ==================  ===============  ============================================

The policy ``merge`` drops nothing, so it has no counts: it is in ``banks.py``.

With ``memory.novelty`` the attention of ``adacm2`` and ``budget`` is mixed with how unlike all
older tokens a token is (``slots.novelty``); with ``memory.decay`` a score is a running mean; with
``memory.shared_choice`` all layers keep the tokens with the highest mean score.

``recent``, ``uniform`` and ``random`` keep exactly as many tokens as ``adacm2`` with the same ρ and
β, after every frame and in every layer, so that a comparison differs in *which* tokens alone.
"""

import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from adacm2_jax.config import AdaCM2Config, MemoryConfig, as_fraction
from adacm2_jax.errors import UserError

#: What ranks the older tokens: the attention they receive, or a number fixed on arrival.
ATTENTION, STRIDE, RANDOM = "attention", "stride", "random"
_RANKING = {
    "adacm2": ATTENTION,
    "full": ATTENTION,
    "recent": ATTENTION,
    "recent_frames": ATTENTION,
    "budget": ATTENTION,
    "uniform": STRIDE,
    "random": RANDOM,
}


@dataclasses.dataclass(frozen=True)
class RetentionPlan:
    """The counts of one model, computed once on the host; layers are a leading axis.

    Attributes:
      capacity: C, the most tokens that any layer holds after a frame.
      recent: int32[L, C + P + 1], tokens kept as the newest, indexed by live tokens.
      older: int32[L, C + P + 1], tokens kept by rank, likewise.
      ranking: ``attention``, ``stride`` or ``random``.
      novelty: its share in the rank by attention, see ``MemoryConfig``.
      decay: the share of a token's score before in its score now.
      shared: whether all layers keep the same tokens, by their mean score.
    """

    capacity: int
    recent: np.ndarray
    older: np.ndarray
    ranking: str
    novelty: float = 0.0
    decay: float = 0.0
    shared: bool = False


def retention_counts(n: int, recent_ratio: Fraction, conserve_ratio: Fraction) -> tuple[int, int]:
    """How many of ``n`` live tokens stay as the newest, and how many of the older ones by score.

    Both are floors of exact products (the paper's Eq. 6 and 7 with ρ and β).
    """
    recent = int(recent_ratio * n)
    return recent, int(conserve_ratio * (n - recent))


def capacity_bound(tokens_per_frame: int, recent_ratio: Fraction, conserve_ratio: Fraction) -> int:
    """C = ⌊P·r / (1 − r)⌋ with r = ρ + (1 − ρ)β: the bound of the paper's Eq. 8, for every t.

    Raises:
      UserError: if r = 1, when nothing is ever dropped and no bound exists.
    """
    kept = recent_ratio + (1 - recent_ratio) * conserve_ratio
    if kept == 1:
        raise UserError(
            f"memory.recent_ratio = {recent_ratio} with memory.conserve_ratio = {conserve_ratio} "
            "keeps every token (r = 1), so the memory has no bound; lower one of them, or choose "
            "policy 'full' with memory.max_frames"
        )
    return int(tokens_per_frame * kept / (1 - kept))


@functools.lru_cache(maxsize=256)
def share_for(tokens: int, tokens_per_frame: int, recent: Fraction = Fraction(0)) -> str:
    """The smallest β, in steps of 1e-5, with which a layer comes to keep ``tokens`` and no more.

    Args:
      tokens: wanted, once the count no longer changes from frame to frame.
      tokens_per_frame: P.
      recent: ρ.

    Raises:
      UserError: if no β settles at that number; names the nearest that one does.
    """
    least, low, high = settled(tokens_per_frame, recent, Fraction(0)), 0, 99_999
    while low < high:
        middle = (low + high) // 2
        enough = settled(tokens_per_frame, recent, Fraction(middle, 100_000)) >= tokens
        low, high = (low, middle) if enough else (middle + 1, high)
    found = settled(tokens_per_frame, recent, Fraction(low, 100_000))
    if found != tokens:
        nearest = least if tokens < least else found
        raise UserError(
            f"with memory.recent_ratio = {recent} and {tokens_per_frame} tokens a frame no "
            f"memory.conserve_ratio settles at {tokens} tokens; the nearest is {nearest}"
        )
    return f"{low / 100_000:.5f}"


def settled(tokens_per_frame: int, recent: Fraction, conserve: Fraction) -> int:
    """How many tokens a layer holds once the count no longer changes from frame to frame."""
    kept, before = 0, -1
    while kept != before:
        before, kept = kept, sum(retention_counts(kept + tokens_per_frame, recent, conserve))
    return kept


@functools.lru_cache(maxsize=64)
def retention_plan(config: MemoryConfig, tokens_per_frame: int, num_layers: int) -> RetentionPlan:
    """Builds the counts of a policy for ``num_layers`` cross-attention layers.

    Raises:
      UserError: for per-layer ratios of another length, or ratios that keep everything.
      ValueError: for a policy that drops no tokens.
    """
    if config.policy not in _RANKING:
        raise ValueError(f"policy {config.policy!r} has no counts of tokens to plan: see banks.py")
    if config.policy in ("full", "recent_frames"):
        # Of N frames that an answer is read from the newest one is not held: it has just come.
        frames = config.max_frames if config.policy == "full" else config.recent_frames - 1
        capacity = frames * tokens_per_frame
        recent = np.minimum(np.arange(capacity + tokens_per_frame + 1), capacity)
        recent = np.tile(recent, (num_layers, 1))
        return _plan(config, capacity, recent, 0 * recent)

    rhos = _per_layer("recent_ratio", config.recent_ratio, num_layers)
    if config.policy == "budget":
        live = np.arange(config.capacity + tokens_per_frame + 1)
        crowded = live > config.capacity
        shares = np.array([[int(rho * config.capacity)] for rho in rhos])
        recent = np.where(crowded, shares, live)
        older = np.where(crowded, config.capacity - shares, 0)
        return _plan(config, config.capacity, recent, older)

    betas = _per_layer("conserve_ratio", config.conserve_ratio, num_layers)
    capacity = max(map(capacity_bound, [tokens_per_frame] * num_layers, rhos, betas))
    counts = np.array(
        [
            [retention_counts(n, rho, beta) for n in range(capacity + tokens_per_frame + 1)]
            for rho, beta in zip(rhos, betas, strict=True)
        ]
    )
    recent, older = counts[..., 0], counts[..., 1]
    if config.policy == "recent":
        recent, older = recent + older, 0 * older
    elif config.policy != "adacm2":
        recent, older = 0 * recent, recent + older
    return _plan(config, capacity, recent, older)


def newest_instead(config: MemoryConfig, tokens_per_frame: int) -> MemoryConfig | None:
    """A memory of as many tokens that are always the newest: what another is compared with.

    Args:
      config: the other one.
      tokens_per_frame: P.

    Returns:
      None where both would hold the same: ``full`` drops nothing, the others are the newest.
    """
    if config.policy in ("full", "recent", "recent_frames"):
        return None
    plain = dataclasses.replace(config, novelty=0.0, decay=0.0, shared_choice=False)
    if config.policy in ("budget", "merge"):  # their size is no matter of the ratios
        capacity = config.capacity
        if config.policy == "merge":
            capacity = config.bank_frames * tokens_per_frame
        return dataclasses.replace(plain, policy="budget", capacity=capacity, recent_ratio=1)
    return dataclasses.replace(plain, policy="recent")


def bound_of(config: AdaCM2Config) -> int:
    """The most tokens that a layer ever holds after a frame; ``full`` after ``max_frames``."""
    if config.memory.policy == "merge":
        return config.memory.bank_frames * config.vision.tokens_per_frame
    return plan_for(config).capacity


def plan_for(config: AdaCM2Config) -> RetentionPlan:
    """The counts of a model's memory; raises as :func:`retention_plan` does."""
    return retention_plan(
        config.memory, config.vision.tokens_per_frame, config.qformer.num_cross_layers
    )


def layers_alike(config: AdaCM2Config) -> bool:
    """Whether all layers hold the same tokens, in the same slots, whatever they attend to."""
    plan = plan_for(config)
    alike = (plan.recent == plan.recent[0]).all() and (plan.older == plan.older[0]).all()
    return bool(alike) and (not plan.older.any() or plan.ranking == STRIDE or plan.shared)


def arrival_rank(
    ranking: str, frame: jax.Array, tokens_per_frame: int, seed: jax.Array
) -> jax.Array:
    """Ranks that are fixed when a frame arrives; higher stays longer.

    ``stride`` orders the token ids ``frame · P + patch`` by their radical inverse in base 2 (van
    der Corput), so that whatever number survives is spread evenly over the video so far. ``random``
    draws uniformly, which makes the survivors a uniform random subset of all tokens seen.

    Args:
      ranking: ``stride`` or ``random``.
      frame: int32[B], the frame's number in its video.
      tokens_per_frame: P.
      seed: uint32[B], of the video (and layer), for ``random``.

    Returns:
      float32[B, P].
    """
    if ranking == RANDOM:

        def draw(seed, frame):
            key = jax.random.fold_in(jax.random.key(seed), frame)
            return jax.random.uniform(key, (tokens_per_frame,), jnp.float32)

        return jax.vmap(draw)(seed, frame)
    token = frame[:, None].astype(jnp.uint32) * tokens_per_frame
    token = token + jnp.arange(tokens_per_frame, dtype=jnp.uint32)
    return 1.0 - _reverse_bits(token).astype(jnp.float32) / 2.0**32


def _reverse_bits(x: jax.Array) -> jax.Array:
    masks = (0x55555555, 0x33333333, 0x0F0F0F0F, 0x00FF00FF)
    for shift, mask in zip((1, 2, 4, 8), masks, strict=True):
        x = ((x >> shift) & jnp.uint32(mask)) | ((x & jnp.uint32(mask)) << shift)
    return (x >> 16) | (x << 16)


def _per_layer(field: str, value, num_layers: int) -> list[Fraction]:
    if not isinstance(value, tuple):
        return [as_fraction(value)] * num_layers
    if len(value) != num_layers:
        raise UserError(
            f"memory.{field} has {len(value)} values, but the Q-Former has {num_layers} "
            "cross-attention layers; give one value, or one for each layer"
        )
    return [as_fraction(ratio) for ratio in value]


def _plan(
    config: MemoryConfig, capacity: int, recent: np.ndarray, older: np.ndarray
) -> RetentionPlan:
    return RetentionPlan(
        capacity,
        recent.astype(np.int32),
        older.astype(np.int32),
        _RANKING[config.policy],
        config.novelty,
        config.decay,
        config.shared_choice,
    )
