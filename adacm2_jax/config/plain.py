"""Configurations as plain values, and back: what JSON and ``ml_collections`` hold."""

import dataclasses
import types
import typing
from fractions import Fraction

from adacm2_jax.config.checks import check_finite
from adacm2_jax.config.model import AdaCM2Config
from adacm2_jax.errors import UserError, printable


def to_dict(config) -> dict:
    """A configuration as plain values that JSON can hold."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Fraction) else value

    return plain(dataclasses.asdict(config))


def from_dict(values: dict, cls: type = AdaCM2Config, path: str = ""):
    """Builds (and so checks) a configuration from plain values; the inverse of :func:`to_dict`.

    Raises:
      UserError: for a field that does not exist or is missing, a wrong type, a number that is not
        finite, or a value out of range.
    """
    if not isinstance(values, dict):
        where, shown = path.rstrip(".") or "a configuration", printable(repr(values)[:60])
        raise UserError(f"{where} must be a table of its fields, not {shown}")
    kinds = typing.get_type_hints(cls)
    fields = {field.name: kinds[field.name] for field in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise UserError(
                f"unknown configuration field {path}{printable(str(name)[:60])}; known: "
                + ", ".join(fields)
            )
        kind = fields[name]
        if dataclasses.is_dataclass(kind):
            value = from_dict(value, typing.cast(type, kind), f"{path}{name}.")
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            check_finite(value, f"{path}{name}")
            value = float(value)
        elif kind is tuple and isinstance(value, list):
            value = _tuples(value)  # JSON has none
        else:
            _check_kind(value, kind, f"{path}{name}")
        _check_finite_within(value, f"{path}{name}")
        arguments[name] = value
    for field in dataclasses.fields(cls):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and field.name not in arguments:
            raise UserError(f"{path}{field.name} is missing; a configuration must have it")
    return cls(**arguments)


def _check_kind(value: typing.Any, kind: typing.Any, name: str) -> None:
    """Compares a value with the type of its field: a class, or some of which it is one."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    kinds = [
        typing.get_origin(each) or each for each in (typing.get_args(kind) if union else [kind])
    ]
    if typing.Literal in kinds or Fraction in kinds:  # its class says which
        return
    if tuple in kinds:
        kinds.append(list)  # JSON has no other
    if type(value) not in kinds:
        known = " or ".join("None" if each is type(None) else each.__name__ for each in kinds)
        raise UserError(f"{name} must be {known}, not {printable(repr(value)[:60])}")


def _check_finite_within(value: typing.Any, name: str) -> None:
    for each in value if isinstance(value, tuple | list) else [value]:
        if isinstance(each, tuple | list):
            _check_finite_within(each, name)
        elif isinstance(each, float):
            check_finite(each, name)


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
