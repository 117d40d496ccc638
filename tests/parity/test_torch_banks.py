"""The rival's banks in PyTorch compute what policy ``merge`` does."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn

from adacm2_jax.config import MemoryConfig, tiny
from adacm2_jax.models.adacm2 import AdaCM2, Question, call, init_params, init_state
from benchmarks._torch_banks import BankedQFormer

FRAMES, WORDS = 9, 6


def test_the_banks_of_the_measurement_are_those_of_policy_merge():
    memory = MemoryConfig(policy="merge", bank_frames=3)
    # The banks have a place for every word, so that no row is padding.
    config = tiny(memory=memory, max_text_len=WORDS)
    boxed = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    params = jax.tree.map(np.asarray, nn.unbox(boxed))
    rng = np.random.default_rng(0)
    shape = 1, FRAMES, config.vision.tokens_per_frame, config.vision.width
    features = rng.normal(size=shape).astype(np.float32)
    ids, mask = rng.integers(1, 500, (1, WORDS)), np.ones((1, WORDS), bool)
    question = Question(jnp.asarray(ids), mask, jnp.asarray(ids), mask)

    @jax.jit
    def read(params, state):
        valid = jnp.ones((1, FRAMES), bool)
        return call(AdaCM2(config), params, "read", features, valid, question, state)

    expected = read(params, init_state(config, jnp.full(1, FRAMES, jnp.int32)))
    reader = BankedQFormer(params, config, ids[0]).eval()
    with torch.inference_mode():
        for index, frame in enumerate(features[0]):
            found = reader(torch.from_numpy(frame), index)
    # float32 in another order of summation; rows are of unit variance after their norm.
    np.testing.assert_allclose(found.numpy(), expected.queries[0], atol=1e-4, rtol=0)
    visual = reader.visual.entries.numpy()
    np.testing.assert_allclose(visual, expected.memory.visual.entries[0, :3], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(reader.visual.sizes, expected.memory.visual.sizes[0, :3])
