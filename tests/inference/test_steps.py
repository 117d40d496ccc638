"""The newest frame held back: what is asked again is what a reading to the end would have found."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adacm2_jax.config import MemoryConfig
from adacm2_jax.inference import steps
from adacm2_jax.models.adacm2 import AdaCM2, Question, init_params, init_state
from adacm2_jax.models.before_last import before_first
from tests.small import quick_compilation, small_model

WORDS, CHUNK = 4, 3
CONFIG = small_model()
MEMORIES = {
    "adacm2": CONFIG.memory,
    "uniform": MemoryConfig(policy="uniform", recent_ratio="0.3", conserve_ratio="0.5"),
    "merge": MemoryConfig(policy="merge", bank_frames=2),
}
#: Of two videos: padding in front, in between, behind, and a chunk of nothing else.
VALID = np.array(
    [
        [[0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1]],
        [[0, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0]],
    ],
    bool,
)


@pytest.fixture(scope="module", autouse=True)
def quick(compiled_once):
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def params():
    """Nothing is left at zero or one, where it would go unnoticed."""
    shapes = nn.unbox(jax.eval_shape(lambda key: init_params(CONFIG, key), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


def ask_about(rows: int, seed: int) -> Question:
    rng = np.random.default_rng(seed)
    mask = np.arange(WORDS) < rng.integers(1, WORDS + 1, (rows, 1))
    ids = rng.integers(CONFIG.qformer.vocab_size, size=(rows, WORDS)).astype(np.int32)
    return Question(ids, mask, ids, mask)


@pytest.mark.parametrize("policy", MEMORIES)
def test_the_newest_frame_is_asked_again_and_again(policy, params):
    model = AdaCM2(dataclasses.replace(CONFIG, memory=MEMORIES[policy]))
    rng = np.random.default_rng(1)
    shape = (2, VALID.shape[1], CHUNK, CONFIG.vision.tokens_per_frame, CONFIG.vision.width)
    features = rng.normal(size=shape).astype(np.float32)
    features[~VALID] = np.nan
    reading, other = ask_about(2, 2), ask_about(4, 3)
    totals = jnp.asarray(VALID.sum((1, 2)), jnp.int32)
    state = init_state(model.config, totals)
    before = before_first(model.config, init_state(model.config, totals))
    assert not np.asarray(steps.ask(model, params, before, reading)).any()
    for i in range(VALID.shape[1]):
        chunk = features[:, i], VALID[:, i]
        state = steps.read(model, params, *chunk, reading, state)
        before = steps.hold_back(model, params, before, *chunk, reading)
        untouched = jax.tree.map(np.array, before)
        # The question that it was read with: as if nothing had been held back.
        asked = steps.ask(model, params, before, reading)
        assert np.isfinite(asked).all()
        np.testing.assert_allclose(asked, state.queries, rtol=1e-5, atol=1e-5)
        # Two others about each video: each as if it were the only one.
        both = np.asarray(steps.ask(model, params, before, other))
        for pair in (slice(0, None, 2), slice(1, None, 2)):
            alone = steps.ask(model, params, before, jax.tree.map(lambda x, p=pair: x[p], other))
            np.testing.assert_allclose(both[pair], alone, rtol=1e-5, atol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, before), untouched)
        seen = VALID[:, : i + 1].sum((1, 2))
        assert before.held.tolist() == (seen > 0).tolist()
        assert before.state.frames_seen.tolist() == np.maximum(seen - 1, 0).tolist()
    assert np.abs(both[::2] - np.asarray(asked)).max() > 1e-2
