"""What a model is made of: frozen dataclasses, checked when they are built, and two presets.

The same code runs at every size, so a model *is* its ``AdaCM2Config``: :func:`tiny` trains on a
laptop in minutes, :func:`instructblip_vicuna_7b` has the shapes of the published checkpoints.
"""

from adacm2_jax.config.checks import Ratio, as_fraction, check_finite, check_numbers
from adacm2_jax.config.memory import POLICIES, SCORED, MemoryConfig, memory_preset
from adacm2_jax.config.model import (
    DTYPES,
    QUANTIZED,
    AdaCM2Config,
    LlamaConfig,
    QFormerConfig,
    VisionConfig,
    instructblip_vicuna_7b,
    tiny,
)
from adacm2_jax.config.plain import from_dict, to_dict

__all__ = [
    "DTYPES",
    "POLICIES",
    "QUANTIZED",
    "SCORED",
    "AdaCM2Config",
    "LlamaConfig",
    "MemoryConfig",
    "QFormerConfig",
    "Ratio",
    "VisionConfig",
    "as_fraction",
    "check_finite",
    "check_numbers",
    "from_dict",
    "instructblip_vicuna_7b",
    "memory_preset",
    "tiny",
    "to_dict",
]
