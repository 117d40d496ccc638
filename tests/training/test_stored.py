"""A training step from features in int8: the numbers of the same features widened by the host."""

import jax
import jax.numpy as jnp
import numpy as np

from adacm2_jax.models.adacm2 import Question
from adacm2_jax.models.params import abstract_params, fresh_params, split_params
from adacm2_jax.sharding import make_mesh
from adacm2_jax.training.step import Batch, StepConfig, loss_and_gradients
from data.feature_cache.shards import pack, unpack
from tests.small import get_config, quick_compilation, small_model


def test_the_loss_and_the_gradients_are_those_of_features_widened_by_the_host():
    model, rows, frames = small_model(dtype="bfloat16"), 4, 5
    step = StepConfig(chunk=3, accumulate=2)
    groups = tuple(get_config().optim.groups)
    mesh = make_mesh(devices=jax.devices()[:1])
    with quick_compilation():
        params = fresh_params(model, abstract_params(model, groups, mesh), 0)
    learned, frozen = split_params(params, groups)
    random = np.random.default_rng(0)
    vision = model.vision
    shape = (rows, frames, vision.tokens_per_frame, vision.width)
    kept = pack(random.standard_normal(shape, np.float32), "int8")
    kept[3, 4] = 0  # padding
    ids = jnp.asarray(random.integers(1, 50, (rows, 6)), jnp.int32)
    mask = jnp.ones((rows, 6), bool)

    def run(features):
        batch = Batch(
            jnp.asarray(features),
            jnp.ones((rows, frames), bool).at[3, 4].set(False),
            jnp.zeros(rows, jnp.uint32),
            Question(ids, mask, ids, mask),
            mask,
        )
        compute = jax.jit(
            lambda a, b, c: loss_and_gradients(a, b, c, model, jax.random.key(0), step)
        )
        return compute(learned, frozen, batch)

    one, other = run(kept), run(unpack(kept, model.feature_dtype))
    assert float(one[0]) > 0
    jax.tree.map(np.testing.assert_array_equal, one, other)
