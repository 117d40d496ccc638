"""Scores of predictions."""

import math


def exact_match(prediction: str, answer: str) -> bool:
    """Equal after lower-casing and trimming white space."""
    return prediction.strip().lower() == answer.strip().lower()


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
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
