"""What a model is made of: frozen dataclasses, checked when they are built, and two presets.

The same code runs at every size, so a model *is* its ``AdaCM2Config``: :func:`tiny` trains on a
laptop in minutes, :func:`instructblip_vicuna_7b` has the shapes of the published checkpoints.
"""

import dataclasses
import math
import re
import types
import typing
from fractions import Fraction

from adacm2_jax.errors import UserError, printable

Ratio = str | int | float | Fraction
POLICIES = ("adacm2", "full", "recent", "uniform", "random", "budget", "merge")
#: Those that rank tokens by a score, which may be mixed with novelty.
SCORED = ("adacm2", "budget")
SCORE_ROWS = ("query", "text", "query+text")
DTYPES = ("float32", "bfloat16", "float16", "float64")
#: Ways to keep a quantised matrix → the dtype of its values.
QUANTIZED = {"int8": "int8", "fp8": "float8_e4m3fn"}
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


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(known)}")


def _divides(name: str, value: int, of_name: str, of_value: int) -> None:
    if value < 1 or of_value % value:
        raise UserError(f"{name} = {value} must divide {of_name} = {of_value}")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """EVA-CLIP ViT-g/14 as LAVIS cuts it: 39 blocks, no final norm, every token returned."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    depth: int = 39
    num_heads: int = 16
    mlp_width: int = 6144
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        check_numbers("vision", self)
        _divides("vision.patch_size", self.patch_size, "vision.image_size", self.image_size)
        _divides("vision.num_heads", self.num_heads, "vision.width", self.width)

    @property
    def tokens_per_frame(self) -> int:
        """P: the patches of one frame and its CLS token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """InstructBLIP's Q-Former: BERT-base with cross-attention in every second layer."""

    vocab_size: int = 30523
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    cross_attention_every: int = 2
    num_queries: int = 32
    max_positions: int = 512
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1

    def __post_init__(self):
        check_numbers("qformer", self, dropout=0, num_queries=0)
        _divides("qformer.num_heads", self.num_heads, "qformer.width", self.width)
        _divides(
            "qformer.cross_attention_every", self.cross_attention_every, "qformer.depth", self.depth
        )
        if self.dropout >= 1:
            raise UserError(f"qformer.dropout must be in [0, 1), not {self.dropout}")

    @property
    def num_cross_layers(self) -> int:
        """L: the layers that read the video, each with a memory of its own."""
        return self.depth // self.cross_attention_every


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A LLaMA decoder; the defaults are Vicuna-7B v1.1 with LAVIS's added ``[PAD]`` row.

    Attributes:
      quantize: how the matrices of its layers are kept: one of :data:`QUANTIZED`; empty: as they
        are. See ``models/quantized.py``.
    """

    vocab_size: int = 32001
    width: int = 4096
    depth: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    mlp_width: int = 11008
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_positions: int = 2048
    tie_embeddings: bool = False
    quantize: str = ""

    def __post_init__(self):
        check_numbers("llm", self)
        _one_of("llm.quantize", self.quantize, ("", *QUANTIZED))
        _divides("llm.num_heads", self.num_heads, "llm.width", self.width)
        _divides("llm.num_kv_heads", self.num_kv_heads, "llm.num_heads", self.num_heads)
        if self.head_dim % 2:
            raise UserError(f"llm.width / llm.num_heads must be even for RoPE, not {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Which visual tokens are kept from frame to frame.

    Attributes:
      policy: one of :data:`POLICIES`; see ``memory/policies.py`` and ``memory/banks.py``.
      recent_ratio: ρ, the share of the live tokens, newest first, that is kept whole; one value, or
        one for each cross-attention layer (a tuple, or text such as ``"0.1,0.2"``).
      conserve_ratio: β, the share of the older tokens, best score first, that is kept; likewise.
      score_rows: the rows whose attention scores a token: ``query`` (as ported checkpoints expect),
        ``text`` or ``query+text``.
      max_frames: ``full`` only: the longest video that it must hold; of a longer one it holds the
        newest ``max_frames`` frames.
      capacity: ``budget`` only: the tokens that a layer holds before anything is dropped.
      novelty: of ``adacm2`` and ``budget``: w in the score (1 − w) · attention + w · novelty, where
        novelty is how unlike all older tokens one is; see ``memory/slots.py``. With 1 no question
        is needed to choose.
      bank_frames: ``merge`` only: M, the frames that each bank holds (MA-LMM's memory_bank_length).
        No gradient passes through the banks.
    """

    policy: str = "adacm2"
    recent_ratio: Ratio | tuple[Ratio, ...] = "0.1"
    conserve_ratio: Ratio | tuple[Ratio, ...] = "0.1"
    score_rows: str = "query"
    max_frames: int = 0
    capacity: int = 0
    novelty: float = 0.0
    bank_frames: int = 0

    def __post_init__(self):
        _one_of("memory.policy", self.policy, POLICIES)
        _one_of("memory.score_rows", self.score_rows, SCORE_ROWS)
        for field in ("recent_ratio", "conserve_ratio"):
            value = getattr(self, field)
            if isinstance(value, str) and "," in value:
                value = value.split(",")
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, field, value)
            for ratio in value if isinstance(value, tuple) else (value,):
                if not 0 <= as_fraction(ratio, f"memory.{field}") <= 1:
                    raise UserError(f"memory.{field} must be in [0, 1], not {ratio}")
        if self.policy == "full" and self.max_frames < 1:
            raise UserError(
                f"memory.max_frames is {self.max_frames}: policy 'full' keeps everything and must "
                "know the longest video; set it to that number of frames"
            )
        if self.policy == "budget" and self.capacity < 1:
            raise UserError(
                f"memory.capacity is {self.capacity}: policy 'budget' needs the number of tokens "
                "that a layer may hold"
            )
        if not 0 <= self.novelty <= 1:
            raise UserError(f"memory.novelty must be in [0, 1], not {self.novelty}")
        if self.novelty and self.policy not in SCORED:
            raise UserError(
                f"memory.novelty is {self.novelty}, but policy {self.policy!r} has no score to mix "
                "it with; use 'adacm2' or 'budget', or 0"
            )
        if self.policy == "merge" and self.bank_frames < 1:
            raise UserError(
                f"memory.bank_frames is {self.bank_frames}: policy 'merge' needs the number of "
                "frames that a bank holds; set it to the checkpoint's (MA-LMM: 10 or 20)"
            )
        check_numbers("memory", self, max_frames=0, capacity=0, bank_frames=0, novelty=0)


@dataclasses.dataclass(frozen=True)
class AdaCM2Config:
    """The whole model.

    Attributes:
      ln_vision_eps: 1e-6 for weights in Hugging Face's form, 1e-5 for LAVIS's and MA-LMM's.
      temporal_positions: rows of the temporal embedding table. A longer video of known length is
        spread over the table by linear interpolation; an open-ended stream uses row t for frame t
        and the last row from there on.
      max_text_len: tokens of a question, for both tokenizers; a longer one is an error.
      max_answer_len: tokens of a training answer, its end token included.
      dtype: of matrix products in the ViT and the LLM, and of their weights where they are frozen:
        ``float32``, ``bfloat16`` or ``float16``. The ViT's residual stream is always float32, as
        are norms, softmax and scores everywhere. ``float64`` (under ``jax_enable_x64``) is for
        proofs: then all of these are float64.
      qformer_dtype: the same of the Q-Former, what surrounds it (ln_vision, temporal embedding,
        language projection) and the memory; empty: ``dtype``. LAVIS and MA-LMM evaluate with
        ``float16`` and ``float32``.
      remat: compute a layer's activations again in the backward pass instead of keeping them.
      fused_vision: the ViT's attention by cuDNN, and fewer kernels beside it in a model that is
        asked, where an NVIDIA GPU computes in half precision.
      fused_memory: a frame's step of the memory by three kernels of ours, where a GPU reads without
        a gradient and tokens are ranked by attention; see memory/fused.py.
    """

    vision: VisionConfig = VisionConfig()
    qformer: QFormerConfig = QFormerConfig()
    llm: LlamaConfig = LlamaConfig()
    memory: MemoryConfig = MemoryConfig()
    ln_vision_eps: float = 1e-6
    temporal_positions: int = 120
    max_text_len: int = 128
    max_answer_len: int = 256
    dtype: str = "float32"
    qformer_dtype: str = ""
    remat: bool = True
    fused_vision: bool = True
    fused_memory: bool = False

    def __post_init__(self):
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("qformer_dtype", self.qformer_dtype, ("", *DTYPES))
        check_numbers("", self)
        if self.max_text_len > self.qformer.max_positions:
            raise UserError(
                f"max_text_len is {self.max_text_len}, but the Q-Former has only "
                f"{self.qformer.max_positions} text positions (qformer.max_positions)"
            )
        needed = self.qformer.num_queries + self.max_text_len + self.max_answer_len
        if needed > self.llm.max_positions:
            raise UserError(
                f"queries + max_text_len + max_answer_len = {needed} exceed llm.max_positions = "
                f"{self.llm.max_positions}; lower max_text_len or max_answer_len"
            )

    @property
    def memory_dtype(self) -> str:
        """Of keys, values and query rows, and so of all that the Q-Former computes."""
        return self.qformer_dtype or self.dtype

    @property
    def feature_dtype(self) -> str:
        """Of what the ViT hands on: its residual stream, rounded to bfloat16 where the Q-Former
        reads bfloat16. A cache of features stores just that."""
        return self.memory_dtype if self.memory_dtype in ("bfloat16", "float64") else "float32"


def instructblip_vicuna_7b(**overrides) -> AdaCM2Config:
    """EVA ViT-g/14, InstructBLIP's Q-Former and Vicuna-7B v1.1: 7.91 billion parameters."""
    return AdaCM2Config(**overrides)


def tiny(**overrides) -> AdaCM2Config:
    """The same model at the size of a laptop: 56-pixel frames of 17 tokens, 1 M parameters."""
    sizes: dict[str, typing.Any] = dict(
        vision=VisionConfig(image_size=56, width=96, depth=3, num_heads=4, mlp_width=192),
        qformer=QFormerConfig(
            vocab_size=512,
            width=96,
            depth=4,
            num_heads=4,
            mlp_width=192,
            num_queries=4,
            max_positions=64,
            dropout=0.0,
        ),
        llm=LlamaConfig(
            vocab_size=512,
            width=96,
            depth=2,
            num_heads=4,
            num_kv_heads=2,
            mlp_width=256,
            max_positions=128,
        ),
        max_text_len=24,
        max_answer_len=8,
    )
    return AdaCM2Config(**(sizes | overrides))


def memory_preset(name: str) -> MemoryConfig:
    """The paper's two readings of α = β = 0.1.

    ``eq8`` (default): α is the recent share, as the paper's bound (Eq. 8) needs; keeps at most 60
    of 317 live tokens a layer at full size. ``eq6``: α is the older share, as its partition (Eq. 6)
    says; keeps at most 2,598 of 2,855.
    """
    presets = {
        "eq8": MemoryConfig(recent_ratio="0.1", conserve_ratio="0.1"),
        "eq6": MemoryConfig(recent_ratio="0.9", conserve_ratio="0.1"),
    }
    _one_of("memory preset", name, tuple(presets))
    return presets[name]


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
