"""How sure a figure is: 95 % intervals, by resampling videos.

Questions and windows of one video stand or fall together, so what is drawn anew is videos, with all
that belongs to each (the cluster bootstrap; Davison and Hinkley 1997, section 3.8). Percentiles are
taken somewhat farther out than 2.5 %, as few videos need (Hesterberg, The American Statistician
69:371, 2015).
"""

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np

#: Times that the videos are drawn anew.
RESAMPLES = 2000
#: Numbers that are in memory at once: 32 MB.
_BLOCK = 1 << 22


def wilson_interval(correct: float, total: float, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927), by default at 95 %.

    Unlike the normal approximation it stays inside [0, 1] and is not empty at 0 or 100 %.
    """
    if not total:
        return 0.0, 1.0
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # Both bounds are within [0, 1] but for rounding.
    return max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)


def numbered(names: Sequence[str]) -> tuple[np.ndarray, int]:
    """int64[n], equal where the names are, from 0 on in order of first sight; and how many."""
    numbers: dict[str, int] = {}
    places = [numbers.setdefault(name, len(numbers)) for name in names]
    return np.array(places, np.int64), len(numbers)


def mean_interval(values: np.ndarray, groups: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean.

    Args:
      values: float64[n], such as 1 for right and 0 for wrong.
      groups: int64[n], the number of each one's video, see :func:`numbered`.
      seed: of the resampling.

    Returns:
      Both bounds. Where the videos do not differ, resampling would find no spread: the interval is
      Wilson's, with as many observations as there are videos; of what may be above 1, and so is no
      share of anything, there is none, and both are the value.
    """
    return macro_interval(values, groups, np.zeros(len(values), np.int64), seed)


def macro_interval(
    values: np.ndarray, groups: np.ndarray, categories: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """:func:`mean_interval` of the mean of the means of categories, int64[n] from 0 on.

    A category that a resample has nothing of does not count in it.
    """
    count, kinds = int(groups.max()) + 1, int(categories.max()) + 1
    sums, sizes = np.zeros((count, kinds)), np.zeros((count, kinds))
    np.add.at(sums, (groups, categories), values)
    np.add.at(sizes, (groups, categories), 1)

    def means(weights: np.ndarray) -> np.ndarray:
        drawn = weights @ sizes
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.nanmean((weights @ sums) / drawn, axis=1)

    (point,) = means(np.ones((1, count)))
    if (values > 1).any() and (count == 1 or (values == values[0]).all()):
        return float(point), float(point)
    if count == 1 or (values == values[0]).all():
        share = min(max(float(point), 0.0), 1.0)
        low, high = wilson_interval(share * count, count)
        return min(low, float(point)), max(high, float(point))
    return resampled(means, count, seed)


def resampled(
    statistic: Callable[[np.ndarray], np.ndarray], count: int, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a statistic of videos.

    Args:
      statistic: float64[b, count], how often each video is drawn, to float64[b].
      count: of the videos, at least 2.
      seed: of the resampling.
    """
    found = np.concatenate([statistic(weights) for weights in _draws(count, seed)])
    outside = expanded_tail(0.025, count)
    low, high = np.quantile(found, [outside, 1 - outside])
    return float(low), float(high)


def expanded_tail(tail: float, count: int) -> float:
    """The percentile that gives ``tail`` of a mean of ``count``: a bootstrap's spread is too small
    by sqrt((n - 1) / n), and its shape is the normal one, not Student's."""
    reach = math.sqrt(count / (count - 1)) * student_quantile(1 - tail, count - 1)
    return statistics.NormalDist().cdf(-reach)


def student_quantile(share: float, freedom: int) -> float:
    """The quantile of Student's t: exact for 1 and 2 degrees of freedom, else by the expansion of
    Cornish and Fisher (Abramowitz and Stegun 26.7.5), for 2.5 % right to 2 in 100 at 3 and better
    above."""
    if freedom == 1:
        return math.tan(math.pi * (share - 0.5))
    if freedom == 2:
        return (2 * share - 1) / math.sqrt(2 * share * (1 - share))
    z = statistics.NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def _draws(count: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of ``count`` videos is drawn, float64[b, count]: RESAMPLES rows in all."""
    if RESAMPLES * count <= _BLOCK:
        yield _few_draws(count, seed)
        return
    random = np.random.default_rng(seed)
    rows = max(1, _BLOCK // count)
    for start in range(0, RESAMPLES, rows):
        yield _drawn(random, min(rows, RESAMPLES - start), count)


@functools.lru_cache(maxsize=4)
def _few_draws(count: int, seed: int) -> np.ndarray:
    return _drawn(np.random.default_rng(seed), RESAMPLES, count)


def _drawn(random: np.random.Generator, rows: int, count: int) -> np.ndarray:
    return random.multinomial(count, np.full(count, 1 / count), size=rows).astype(np.float64)
