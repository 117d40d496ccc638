"""The memory once more, with Python lists that grow and shrink.

Written from the description of the method alone, so that the static-shape memory has something to
agree with. One video, one layer, one frame at a time, float64; counts by exact fractions.
"""

import dataclasses
from fractions import Fraction

import numpy as np

#: Unit roundoff of float32: one operation is off by at most this much, relative to its result.
U = 2.0**-24


def kept_counts(policy: str, n: int, rho: Fraction, beta: Fraction, limit: int) -> tuple[int, int]:
    """(newest tokens that stay whole, older ones that stay by rank) of ``n`` live tokens.

    ``limit`` is the capacity of ``budget``, ``max_frames · P`` of ``full``, and
    ``(recent_frames − 1) · P`` of ``recent_frames``.
    """
    if policy in ("full", "recent_frames"):
        return min(n, limit), 0
    if policy == "budget":
        newest = (rho * limit).__floor__()
        return (n, 0) if n <= limit else (newest, limit - newest)
    newest = (rho * n).__floor__()
    older = (beta * (n - newest)).__floor__()
    if policy == "recent":
        return newest + older, 0
    if policy in ("uniform", "random"):
        return 0, newest + older
    return newest, older


def radical_inverse(number: int) -> Fraction:
    """The binary digits of a number, mirrored behind the point: 6 = 110 becomes 0.011."""
    digits = f"{number:b}"[::-1]
    return Fraction(int(digits, 2), 2 ** len(digits))


@dataclasses.dataclass
class Step:
    """What one frame did, and how far float32 arithmetic may stray from it.

    Attributes:
      output: [H, N, D].
      output_error: bound on the absolute error of any float32 output.
      live: (frame, patch) of every token attended to, oldest first.
      score: [n], what the tokens were ranked by.
      score_error: bound on the relative error of a float32 score; 0 where ranks are exact.
      score_slack: bound on its absolute error beyond that.
      newest: how many of the newest stay whole.
      kept: (frame, patch) of the tokens that stay, oldest first.
    """

    output: np.ndarray
    output_error: float
    live: list[tuple[int, int]]
    score: np.ndarray
    score_error: float
    newest: int
    kept: list[tuple[int, int]]
    score_slack: float = 0.0

    def is_near_tie(self, other: list[tuple[int, int]]) -> bool:
        """Whether ``other`` is what rounding alone may have made of this selection.

        That is: as many tokens, the newest among them, and every token chosen otherwise so close to
        those that it replaced that float32 cannot tell which is the higher.
        """
        score = dict(zip(self.live, self.score, strict=True))
        gone, come = set(self.kept) - set(other), set(other) - set(self.kept)
        first_new = len(self.live) - self.newest
        if len(other) != len(self.kept) or come & set(self.live[first_new:]) or not gone:
            return False
        if not come <= set(self.live) or set(self.live[first_new:]) & gone:
            return False
        high, low = max(score[token] for token in gone), min(score[token] for token in come)
        return high - low <= self.score_error * (high + low) + 2 * self.score_slack


class RaggedMemory:
    """What one layer remembers of one video."""

    def __init__(
        self, policy: str, rho, beta, limit: int = 0, novelty: float = 0.0, decay: float = 0.0
    ):
        self.policy, self.limit, self.novelty, self.decay = policy, limit, novelty, decay
        self.rho, self.beta = Fraction(str(rho)), Fraction(str(beta))
        self.tokens: list[tuple[int, int]] = []
        self.keys: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        self.ranks: list[Fraction] = []
        self.scores: list[float] = []
        self.score_error = self.score_slack = 0.0
        self.frames = 0

    def see(self, query, key, value, *, scoring, ranks=None) -> Step:
        """One frame: append, attend to everything, score, prune.

        Args:
          query: [H, N, D].
          key: [H, P, D].
          value: [H, P, D].
          scoring: [H, R, D], the rows that score.
          ranks: [P], the numbers drawn for this frame's tokens (policy ``random``).
        """
        tokens = key.shape[1]
        for patch in range(tokens):
            number = self.frames * tokens + patch
            drawn = -radical_inverse(number) if ranks is None else Fraction(float(ranks[patch]))
            self.tokens.append((self.frames, patch))
            self.keys.append(np.asarray(key[:, patch], np.float64))
            self.values.append(np.asarray(value[:, patch], np.float64))
            self.ranks.append(drawn)
        self.frames += 1

        keys, values = np.stack(self.keys, axis=1), np.stack(self.values, axis=1)
        output = _probs(query, keys) @ values
        live, n = list(self.tokens), len(self.tokens)
        error = _probs_error(query, keys)
        if self.policy in ("uniform", "random"):
            score, score_error = list(self.ranks), 0.0
        else:
            score = _probs(scoring, keys).sum(axis=(0, 1))
            rows = scoring.shape[0] * scoring.shape[1]
            score_error = _probs_error(scoring, keys) + (rows + 1) * U
        slack = 0.0
        if self.novelty:
            share = score / score.max()
            score = (1 - self.novelty) * share + self.novelty * _novelty(keys)
            # Of a quotient of two scores; a cosine is a sum of H · D products of numbers whose
            # length is right to as many roundings (half of them, by its square root, and twice).
            size = keys.shape[0] * keys.shape[2]
            slack = (1 - self.novelty) * (2 * score_error + U) + self.novelty * (2 * size + 8) * U
            score_error = 3 * U
        if self.decay:
            held = len(self.scores)
            score = np.array(score)
            score[:held] = (1 - self.decay) * score[:held] + self.decay * np.array(self.scores)
            # A mean is no further off than its parts, but for two products and a sum.
            score_error = self.score_error = max(score_error, self.score_error) + 3 * U
            slack = self.score_slack = max(slack, self.score_slack)
            self.scores = list(score)

        newest, count = kept_counts(self.policy, n, self.rho, self.beta, self.limit)
        ranking = sorted(range(n - newest), key=lambda i: -score[i])  # stable: ties to the oldest
        stay = sorted(ranking[:count]) + list(range(n - newest, n))
        self._last = (live, self.keys, self.values, self.ranks, self.scores)
        self._keep(stay)
        return Step(
            output=output,
            output_error=(error + (n + 1) * U) * np.abs(values).max(),
            live=live,
            score=np.asarray(score),
            score_error=score_error,
            newest=newest,
            kept=list(self.tokens),
            score_slack=slack,
        )

    def adopt(self, kept: list[tuple[int, int]]) -> None:
        """Goes on from another selection of the last frame."""
        self.tokens, self.keys, self.values, self.ranks, self.scores = self._last
        self._keep([self.tokens.index(token) for token in kept])

    def _keep(self, stay: list[int]) -> None:
        for name in ("tokens", "keys", "values", "ranks", "scores"):
            if items := getattr(self, name):
                setattr(self, name, [items[i] for i in stay])


def _novelty(keys) -> np.ndarray:
    """Of each of n tokens, half the cosine distance to the second nearest of those before it, 1
    where there are no two; [H, n, D] → [n]."""
    found = []
    for i in range(keys.shape[1]):
        mine, likeness = keys[:, i].ravel(), [-1.0, -1.0]
        for j in range(i):
            other = keys[:, j].ravel()
            lengths = np.linalg.norm(mine) * np.linalg.norm(other)
            likeness.append(mine @ other / lengths if lengths else 0.0)
        found.append((1 - sorted(likeness)[-2]) / 2)
    return np.array(found)


def _probs(query, keys) -> np.ndarray:
    """Softmax attention [H, R, n] of [H, R, D] over [H, n, D]."""
    logits = np.asarray(query, np.float64) @ keys.transpose(0, 2, 1) / np.sqrt(keys.shape[-1])
    weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)


def _probs_error(query, keys) -> float:
    """How far, relatively, a float32 attention probability may be off.

    With A the largest Σ|q·k| / √D: a logit is off by (D + 2)·U·A (products, sum, scaling), its
    distance to the maximum by 2·U·A more; either enters a probability twice, by its own exponential
    and by the sum. Beyond that: exponentials right to two units in the last place (4·U, twice), a
    sum of n terms, one division. What is of second order is below a thousandth of it.
    """
    size, n = keys.shape[-1], keys.shape[1]
    products = np.abs(np.asarray(query, np.float64)) @ np.abs(keys).transpose(0, 2, 1)
    largest = products.max(initial=0.0) / np.sqrt(size)
    assert largest < 40, "exponentials might underflow, which the bound leaves out"
    return U * (2 * (size + 4) * largest + 8 + n + 1) * 1.001
