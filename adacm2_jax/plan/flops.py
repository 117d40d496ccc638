"""The arithmetic of a step: the matrix products of the very program that is compiled.

They are counted in the traced program (its jaxpr), where every loop says how often it runs. XLA's
own ``cost_analysis()`` counts the body of a loop once, and has no figure for a GPU that is absent.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.interpreters import partial_eval


def product_flops(program: Any, unknown_rounds: int = 1, *, loops_once: bool = False) -> float:
    """Floating-point operations of matrix products and convolutions, two a multiplication.

    They are those of all devices together. In a ``shard_map`` shapes are those of one device, so
    what stands there counts once for each of its devices. Elsewhere shapes are global, and each
    product counts once: what the compiler computes on several devices alike is not seen here.
    Neither is what it removes because nobody reads it: that does not count.

    Args:
      program: a closed jaxpr, such as ``jax.jit(f).trace(…).jaxpr``.
      unknown_rounds: what a ``while`` counts, which ends by its data. A ``scan`` or a ``fori_loop``
        between constants counts its length, a ``cond`` its dearest branch.
      loops_once: count each loop's body once, as ``cost_analysis()`` does.
    """
    read, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return _count(read, unknown_rounds, loops_once)


def _count(jaxpr: Any, unknown_rounds: int, loops_once: bool) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        inner = [_count(each, unknown_rounds, loops_once) for each in _programs(equation.params)]
        name = equation.primitive.name
        if name == "dot_general":
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "cond":
            total += max(inner)
        elif name == "scan" and not loops_once:
            total += equation.params["length"] * sum(inner)
        elif name == "while" and not loops_once:
            total += unknown_rounds * sum(inner)
        elif name == "shard_map":
            sizes, axes = equation.params["mesh"].shape, equation.params["newly_manual_axes"]
            total += math.prod(sizes[axis] for axis in axes) * sum(inner)
        else:
            total += sum(inner)
    return total


def _programs(params: dict[str, Any]) -> Iterator[Any]:
    """What an equation runs: a function, the branches of a ``cond``, a loop's test and body."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(jaxpr := getattr(each, "jaxpr", each), "eqns"):
                yield jaxpr


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    """Every place of the kernel counts, also where it lies on padding."""
    kernel = equation.invars[1].aval
    features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * equation.outvars[0].aval.size * kernel.size / features
