"""AdaCM² in JAX: long-video understanding with a visual memory of constant size.

    >>> import adacm2_jax
    >>> model = adacm2_jax.load("runs/quickstart/main")
    >>> model.ask("clip.mp4", "which digit was on the red ground?").answer

The idea is in ``memory/``, the networks in ``models/``, and ``models/adacm2.py`` joins them.
Importing this package imports nothing else; what it offers comes when it is asked for.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

#: Name → the module that has it.
_OFFERED = {
    "load": "adacm2_jax.runs.load",
    "VideoModel": "adacm2_jax.inference.model",
    "Session": "adacm2_jax.inference.session",
    "Reply": "adacm2_jax.inference.reply",
    "Moment": "adacm2_jax.inference.reply",
    "Choice": "adacm2_jax.inference.reply",
    "Sampling": "adacm2_jax.video.sampling",
    "UserError": "adacm2_jax.errors",
    "DataError": "adacm2_jax.errors",
}

__all__ = [
    "Choice",
    "DataError",
    "Moment",
    "Reply",
    "Sampling",
    "Session",
    "UserError",
    "VideoModel",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_OFFERED[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_OFFERED])
