"""What every field of a configuration is held against: ratios, numbers, choices."""

import dataclasses
import math
import re
import typing
from fractions import Fraction

from adacm2_jax.errors import UserError, printable

Ratio = str | int | float | Fraction
#: Whole numbers become int32 on the accelerator, others float32.
_MOST = {int: 2**31 - 1, float: 3.4e38}
#: Characters and decimal exponent of a ratio's text: written out, 1e999999999 fills the memory.
_RATIO_LENGTH, _RATIO_EXPONENT = 1000, 300


def as_fraction(value: Ratio, name: str = "a ratio") -> Fraction:
    """Reads a ratio exactly: 0.29 is 29/100 and not the binary float beside it.

    Raises:
      UserError: if the value is no number; ``name`` says what it was meant for.
    """
    try:
        text = str(value)
        exponent = re.search(r"[eE][+-]?0*(\d*)", text)
        if len(text) > _RATIO_LENGTH or (exponent and int(exponent[1] or 0) > _RATIO_EXPONENT):
            raise ValueError("too long")
        return Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        given = printable(repr(value)[:60])
        raise UserError(f"{name} must be a number such as 0.1 or '1/10', not {given}") from error


def check_numbers(
    section: str, config: typing.Any, most: dict[str, int] | None = None, **least: float
) -> None:
    """Checks every number of a configuration: whole ones are at least 1, others are above 0.

    Args:
      section: of the configuration in the experiment, for messages; empty for the topmost.
      config: a dataclass; its fields of type ``int`` and ``float`` are checked.
      most: of fields that may not be as large as the machine's numbers.
      least: of fields that may be smaller than that, themselves included.

    Raises:
      UserError: naming the field, its value and what it must be.
    """
    for field in dataclasses.fields(config):
        if field.type not in (int, float):
            continue
        value, name = getattr(config, field.name), f"{section}.{field.name}".lstrip(".")
        low, high = least.get(field.name), (most or {}).get(field.name, _MOST[field.type])
        if field.type is int:
            low, bound = (1, "at least 1") if low is None else (low, f"at least {low}")
            inside = low <= value
        else:
            check_finite(value, name)
            inside = value > 0 if low is None else value >= low
            bound = "above 0" if low is None else f"at least {low:g}"
        if not inside:
            raise UserError(f"{name} = {value} must be {bound}")
        if value > high:
            shown = f"{high:,}" if field.type is int else f"{high:g}"
            raise UserError(f"{name} = {value} must be at most {shown}; lower it")


def check_finite(value: float, name: str) -> None:
    """Refuses what is not a number, or endless: JSON has neither, and nothing can be computed.

    Raises:
      UserError: naming it.
    """
    try:
        finite = math.isfinite(value)
    except OverflowError:  # of a whole number beyond all others
        finite = False
    if not finite:
        raise UserError(f"{name} = {value!r:.60} must be a finite number")


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(known)}")


def divides(name: str, value: int, of_name: str, of_value: int) -> None:
    if value < 1 or of_value % value:
        raise UserError(f"{name} = {value} must divide {of_name} = {of_value}")
