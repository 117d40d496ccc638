import jax
import pytest


@pytest.fixture(autouse=True)
def exact_matrix_products():
    """Accelerators would otherwise round the operands; on CPU it changes nothing."""
    with jax.default_matmul_precision("highest"):
        yield
