"""A grid of experiments from one command: memories to compare, and fields that vary.

A memory is written ``LABEL=POLICY:FIELD=VALUE:…``, for example ``adacm2``,
``adacm2:decay=0.5``, ``hybrid=adacm2:novelty=0.5`` or ``recent_frames:recent_frames=4``; the label
is by default the whole text. A size that it does not name is that of the others, rounded up.
"""

import ast
import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from adacm2_jax.config import POLICIES, AdaCM2Config, MemoryConfig, as_fraction, from_dict
from adacm2_jax.errors import UserError, printable
from adacm2_jax.memory.policies import retention_plan, share_for
from adacm2_jax.models.adacm2 import check_memory
from adacm2_jax.runs.experiment import Experiment, read, to_dict
from adacm2_jax.video.room import check_room

#: What a policy's size is called; of those that are not here it follows from the ratios.
_SIZES = {
    "full": "max_frames",
    "recent_frames": "recent_frames",
    "budget": "capacity",
    "merge": "bank_frames",
}
#: What a memory has of the run where it names none: fields of ``model.memory``.
RATIOS = ("recent_ratio", "conserve_ratio")
OF_THE_RUN = (*RATIOS, "score_rows")
_SPEC = re.compile(r"(?:(?P<label>[^=:]+)=)?(?P<policy>\w+)(?P<fields>(?::\w+=[^:]+)*)")


@dataclasses.dataclass(frozen=True)
class Memory:
    """One memory of a comparison.

    Attributes:
      label: it is reported by.
      policy: one of ``config.POLICIES``.
      fields: of ``MemoryConfig`` that differ from the run's.
    """

    label: str
    policy: str
    fields: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Memory":
        """Reads what a command line says.

        Raises:
          UserError: for another form, an unknown policy or field.
        """
        found, shown = _SPEC.fullmatch(text.strip()), printable(text[:60])
        if not found or printable(text) != text:
            raise UserError(
                f"--memory {shown} must be POLICY or LABEL=POLICY:FIELD=VALUE, such as "
                "adacm2:decay=0.5"
            )
        policy, known = found["policy"], {f.name for f in dataclasses.fields(MemoryConfig)}
        if policy not in POLICIES:
            raise UserError(
                f"--memory {shown}: policy {policy!r} is unknown; there are {', '.join(POLICIES)}"
            )
        fields = {}
        for part in found["fields"].split(":")[1:]:
            name, _, value = part.partition("=")
            if name not in known - {"policy"}:
                raise UserError(
                    f"--memory {shown}: memory.{name} is unknown; there are "
                    f"{', '.join(sorted(known - {'policy'}))}"
                )
            if name in fields:
                raise UserError(f"--memory {shown}: memory.{name} is there twice; leave one out")
            if name in _SIZES.values() and name != _SIZES.get(policy):
                raise UserError(
                    f"--memory {shown}: memory.{name} is of another policy, and {policy} would be "
                    "what it is without it; leave it out"
                )
            fields[name] = value if name.endswith("_ratio") else value_of(value)
        label = (found["label"] or text).strip()
        if not label:
            raise UserError(f"--memory {shown}: the label is empty; name it, or leave out the =")
        return cls(label, policy, tuple(fields.items()))

    def config(
        self, run: MemoryConfig, tokens_per_frame: int, layers: int, frames: int, tokens: int
    ) -> MemoryConfig:
        """Its settings.

        Args:
          run: the memory of the run, whose ratios count where none are named.
          tokens_per_frame: P.
          layers: cross-attention layers.
          frames: of the longest video.
          tokens: that a layer is to hold once the count no longer changes; 0: what the run's
            ratios give.

        Raises:
          UserError: for settings that cannot be, or no ratio that gives that many tokens.
        """
        given: dict[str, Any] = dict(self.fields)
        ratios = {name: given.get(name, getattr(run, name)) for name in RATIOS}
        if tokens and "conserve_ratio" not in given and self.policy not in _SIZES:
            recent = ratios["recent_ratio"]
            if isinstance(recent, tuple) or "," in str(recent):
                raise UserError(
                    f"--memory {self.label}: --tokens needs one memory.recent_ratio for all layers"
                )
            ratios["conserve_ratio"] = share_for(tokens, tokens_per_frame, as_fraction(recent))
        base = dataclasses.replace(MemoryConfig(), score_rows=run.score_rows)
        size = _SIZES.get(self.policy)
        if size and size not in given:
            held = tokens or _held(run, tokens_per_frame, layers)
            given[size] = {
                "full": frames,
                "recent_frames": 1 + math.ceil(held / tokens_per_frame),
                "budget": held,
                "merge": math.ceil(held / tokens_per_frame),
            }[self.policy]
        values = dataclasses.asdict(base) | ratios | given | {"policy": self.policy}
        try:
            return from_dict(values, MemoryConfig, "memory.")
        except UserError as error:
            raise UserError(f"--memory {self.label}: {error}") from None

    def is_sized(self) -> bool:
        """Whether it has a size of its own, whatever the others hold."""
        size = _SIZES.get(self.policy, "conserve_ratio")
        return self.policy == "full" or size in dict(self.fields)


def _held(run: MemoryConfig, tokens_per_frame: int, layers: int) -> int:
    ratios = {name: getattr(run, name) for name in RATIOS}
    return retention_plan(MemoryConfig(**ratios), tokens_per_frame, layers).capacity


def memories_of(
    memories: Sequence[Memory], experiment: Experiment, frames: int, tokens: Sequence[int]
) -> dict[str, MemoryConfig]:
    """All memories in all sizes, by label; a memory with a size of its own is there once.

    Args:
      memories: of the comparison.
      experiment: of the run.
      frames: of the longest video.
      tokens: sizes; empty: the run's.

    Raises:
      UserError: for settings that cannot be, or that the model or this machine's memory has no room
        for; or a label that is there twice.
    """
    model = experiment.model
    found: dict[str, MemoryConfig] = {}
    for memory in memories:
        for size in (0,) if memory.is_sized() or not tokens else tokens:
            label = f"{memory.label} @{size}" if size else memory.label
            if label in found:
                raise UserError(f"--memory {label} is there twice; give one of them a label")
            made = memory.config(
                model.memory,
                model.vision.tokens_per_frame,
                model.qformer.num_cross_layers,
                frames,
                size,
            )
            _check(label, dataclasses.replace(model, memory=made))
            found[label] = made
    return found


def _check(label: str, model: AdaCM2Config) -> None:
    """Refuses a memory that the model or this machine has no room for."""
    memory, qformer = model.memory, model.qformer
    tokens = memory.capacity
    if memory.policy in ("full", "recent_frames", "merge"):
        tokens = getattr(memory, _SIZES[memory.policy]) * model.vision.tokens_per_frame
    each = 2 * qformer.width * jnp.dtype(model.memory_dtype).itemsize  # a key and a value
    check_room(
        tokens * qformer.num_cross_layers * each,
        f"--memory {label}: the {tokens:,} tokens that each layer may hold",
        "lower its size, or --frames",
    )
    try:
        check_memory(model)
    except UserError as error:
        raise UserError(f"--memory {label}: {error}") from None


def value_of(text: str) -> Any:
    """A value as it stands on a command line: Python's, or else text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def varied(given: Sequence[str]) -> list[dict[str, Any]]:
    """All combinations of ``FIELD=VALUE,VALUE,…``; one empty one where nothing varies. Commas
    within brackets are a value's own.

    Raises:
      UserError: for another form, or a field or a value that is there twice.
    """
    names, values = [], []
    for text in given:
        name, equals, rest = text.partition("=")
        shown = printable(text[:60])
        if not equals or not name or not rest:
            raise UserError(f"--vary {shown} must be FIELD=VALUE,VALUE,…")
        if name in names:
            raise UserError(f"--vary {shown}: {name} varies already; give its values together")
        names.append(name)
        values.append([value_of(part) for part in _parts(rest)])
        check_once(f"--vary {shown}", values[-1])
    return [dict(zip(names, each, strict=True)) for each in itertools.product(*values)]


def check_once(what: str, values: Iterable[Any]) -> None:
    """Refuses a value that is there twice: its answers would count twice.

    Raises:
      UserError: naming it.
    """
    for text, count in Counter(map(repr, values)).items():
        if count > 1:
            raise UserError(f"{what} has {printable(text[:60])} {count} times; leave it there once")


def _parts(text: str) -> list[str]:
    """Cuts at the commas that are not within brackets, if every bracket is closed."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
        if depth < 0:
            break
    return text.split(",") if depth else parts


def overridden(experiment: Experiment, fields: dict[str, Any], frames: int = 0) -> Experiment:
    """The same with other fields, such as ``data.suite.styles``; one value of what holds several is
    enough.

    Args:
      experiment: of a run.
      fields: by their paths.
      frames: T of the videos, set wherever it stands; 0: as they are.

    Raises:
      UserError: for an unknown field, or a value that it cannot have.
    """
    values = to_dict(experiment, plain=False)
    flat = dict(fields)
    if frames:
        source = flat.get("data.source", experiment.data.source)
        flat |= {"data.sampling.num_frames": frames, "eval.full_frames": frames}
        if flat.get("data.sampling.mode", experiment.data.sampling.mode) == "fps":
            flat["data.sampling.max_frames"] = frames
        if "num_frames" in values["data"].get(str(source), {}):
            flat[f"data.{source}.num_frames"] = frames
    for name, value in flat.items():
        *path, last = name.split(".")
        part: Any = values
        for each in path:
            part = part.get(each) if isinstance(part, dict) else None
        if not isinstance(part, dict) or last not in part:
            raise UserError(f"field {printable(name[:60])} is unknown; see config.json of the run")
        if isinstance(part[last], dict) and name != "data.jsonl":
            raise UserError(f"field {name} is a table; set one of {name}.{', '.join(part[last])}")
        several = isinstance(part[last], tuple) and not isinstance(value, tuple)
        part[last] = (value,) if several else value
    return read(values)
