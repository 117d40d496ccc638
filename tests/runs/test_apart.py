"""A model that is to be asked is read layer by layer."""

import dataclasses

import jax
import numpy as np
import pytest

from adacm2_jax.models.params import Layers, abstract_params, join_params, unstacked
from adacm2_jax.runs.checkpoint import restore_params
from adacm2_jax.runs.load import experiment_of
from adacm2_jax.sharding import make_mesh


def abstract(run, **fields):
    """The parameters of a run, the frozen ones in bfloat16, on one device."""
    experiment = experiment_of(run)
    model = dataclasses.replace(experiment.model, dtype="bfloat16")
    model = dataclasses.replace(model, llm=dataclasses.replace(model.llm, **fields))
    mesh = make_mesh((1, 1), jax.devices()[:1])
    groups = (("(vision|llm)/.*", None), (".*", 1.0))
    return abstract_params(model, groups, mesh)


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_the_same_values_as_from_stacked_arrays(small_run, quantize):
    wanted = abstract(small_run, quantize=quantize)
    found = restore_params(small_run, wanted, apart=True)
    stacked = [path for path, leaf in found.items() if isinstance(leaf, Layers)]
    assert stacked and all(path.startswith(("vision/blocks/", "llm/layers/")) for path in stacked)
    apart = unstacked(join_params(found, {}))
    together = unstacked(join_params(restore_params(small_run, wanted), {}))
    assert jax.tree.structure(apart) == jax.tree.structure(together)
    for one, other in zip(jax.tree.leaves(apart), jax.tree.leaves(together), strict=True):
        assert one.dtype == other.dtype and one.sharding == other.sharding
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
