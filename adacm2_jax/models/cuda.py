"""Whether programs for NVIDIA GPUs can be made here."""

import importlib.util

#: Compiler's options for a program whose products are large: all by cuBLASLt, which adds biases and
#: applies GELU within a product. XLA's own kernels for products are out of its choice then, and
#: with them what it leaves outside of a product to have that choice. Other compilers ignore them.
EPILOGUES = {"xla_gpu_enable_triton_gemm": False}


def has_cuda() -> bool:
    """Whether jax's plugin for NVIDIA GPUs is installed; without it cuDNN cannot be asked for."""
    return any(
        importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(f"jax_plugins.{name}")
        for name in ("xla_cuda12", "xla_cuda13")
    )
