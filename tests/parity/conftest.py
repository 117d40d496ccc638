import jax
import pytest
import torch

# What PyTorch computes here is small: its threads would only wait for each other, and take the
# cores from XLA's while they do.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def exact_matrix_products():
    """Accelerators would otherwise round the operands; on CPU it changes nothing."""
    with jax.default_matmul_precision("highest"):
        yield
