"""The newest frame held back: what is asked again is what a reading to the end would have found."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adacm2_jax.config import MemoryConfig
from adacm2_jax.inference import session_steps, steps
from adacm2_jax.inference.session import open_memory
from adacm2_jax.inference.session_steps import SessionModels
from adacm2_jax.models.adacm2 import AdaCM2, Question, init_params, init_state
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
    """Known questions by a memory of each policy, late ones by an open memory."""
    memories = MEMORIES[policy], open_memory(7)
    models = SessionModels(*(AdaCM2(dataclasses.replace(CONFIG, memory=m)) for m in memories))
    rng = np.random.default_rng(1)
    shape = (2, VALID.shape[1], CHUNK, CONFIG.vision.tokens_per_frame, CONFIG.vision.width)
    features = rng.normal(size=shape).astype(np.float32)
    features[~VALID] = np.nan
    known, generic, late = ask_about(4, 2), ask_about(2, 4), ask_about(4, 3)
    unknown = jnp.zeros(4, jnp.int32)
    # What a reading finds that holds nothing back: two known questions a video, and each late one
    # as if it alone had been asked of the same open memory all the time, which it does not choose.
    state = init_state(models.known.config, unknown)
    late_state = init_state(models.open.config, unknown)
    session = session_steps.begin(models, 2, 2)
    assert not np.asarray(session_steps.ask_known(models, params, session, known)).any()
    for i in range(VALID.shape[1]):
        chunk = features[:, i], VALID[:, i]
        state = steps.read(models.known, params, *chunk, known, state)
        late_state = steps.read(models.open, params, *chunk, late, late_state)
        session = session_steps.push(models, params, session, *chunk, known, generic)
        untouched = jax.tree.map(np.array, session)
        asked = session_steps.ask_known(models, params, session, known)
        assert np.isfinite(asked).all()
        np.testing.assert_allclose(asked, state.queries, rtol=1e-5, atol=1e-5)
        both = np.asarray(session_steps.ask_late(models, params, session, late))
        np.testing.assert_allclose(both, late_state.queries, rtol=1e-5, atol=1e-5)
        for pair in (slice(0, None, 2), slice(1, None, 2)):
            one = jax.tree.map(lambda x, p=pair: x[p], late)
            alone = session_steps.ask_late(models, params, session, one)
            np.testing.assert_allclose(both[pair], alone, rtol=1e-5, atol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, session), untouched)
        seen = VALID[:, : i + 1].sum((1, 2))
        assert session.held.tolist() == (seen > 0).tolist()
        assert session.seen.tolist() == seen.tolist()
    assert np.abs(both[::2] - both[1::2]).max() > 1e-2


def test_rows_of_one_state_are_what_each_session_is_alone(params):
    models = SessionModels(
        AdaCM2(CONFIG), AdaCM2(dataclasses.replace(CONFIG, memory=open_memory(7)))
    )
    rng = np.random.default_rng(1)
    shape = (2, CHUNK, CONFIG.vision.tokens_per_frame, CONFIG.vision.width)
    known, generic = ask_about(4, 2), ask_about(2, 4)
    parts = [session_steps.begin(models, 1, 2) for _ in range(2)]
    together = session_steps.begin(models, 2, 2)
    for valid in VALID.swapaxes(0, 1):
        features = rng.normal(size=shape).astype(np.float32)
        together = session_steps.push(models, params, together, features, valid, known, generic)
        for v in range(2):
            rows = jax.tree.map(lambda x, v=v: x[2 * v : 2 * v + 2], known)
            one = jax.tree.map(lambda x, v=v: x[v : v + 1], generic)
            chunk = features[v : v + 1], valid[v : v + 1]
            parts[v] = session_steps.push(models, params, parts[v], *chunk, rows, one)
    for whole, part in (
        (together, session_steps.stack(parts)),
        *zip(session_steps.split(together), parts, strict=True),
    ):
        for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
            exact = not jnp.issubdtype(one.dtype, jnp.floating)
            np.testing.assert_allclose(one, other, rtol=0, atol=0 if exact else 1e-5)
