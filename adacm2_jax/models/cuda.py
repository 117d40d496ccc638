"""Whether programs for NVIDIA GPUs can be made here."""

import importlib.util


def has_cuda() -> bool:
    """Whether jax's plugin for NVIDIA GPUs is installed; without it cuDNN cannot be asked for."""
    return any(
        importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(f"jax_plugins.{name}")
        for name in ("xla_cuda12", "xla_cuda13")
    )
