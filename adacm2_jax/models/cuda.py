"""Whether programs for NVIDIA GPUs can be made here."""

import importlib.util

from adacm2_jax.config import AdaCM2Config

#: See :func:`compiler_options`.
EPILOGUES = {"xla_gpu_enable_triton_gemm": False}


def compiler_options(config: AdaCM2Config) -> dict[str, bool] | None:
    """Of a program with the ViT, which no other program may call if there are any.

    With ``model.fused_epilogues`` all products are by cuBLASLt, which adds biases and applies GELU
    within a product. XLA's own kernels are out of its choice then, and with them what it leaves
    outside of a product to have that choice. Compilers for other devices ignore them.
    """
    return EPILOGUES if config.fused_epilogues else None


def has_cuda() -> bool:
    """Whether jax's plugin for NVIDIA GPUs is installed; without it cuDNN cannot be asked for."""
    return any(
        importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(f"jax_plugins.{name}")
        for name in ("xla_cuda12", "xla_cuda13")
    )
