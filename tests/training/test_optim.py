"""Which parameters learn, how fast, and by what rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.models.params import group_of, join_params, split_params
from adacm2_jax.training.optim import gradient_norms, make_optimizer

PARAMS = {
    "vision": {"patch": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}},
    "qformer": {"norm": {"scale": jnp.ones(4)}, "query_tokens": jnp.ones((2, 4))},
    "llm": {"head": {"kernel": jnp.ones((4, 4))}},
}
ALL = ((".*", 1.0),)
SETTINGS = dict(
    learning_rate=0.1, steps=10, warmup_steps=2, weight_decay=0.0, b1=0.9, b2=0.999, clip_norm=1e9
)


def optimizer(learned, groups=ALL, **changes):
    return make_optimizer(learned, groups=groups, **(SETTINGS | changes))


def steps(learned, rule, gradients, count=1):
    state = rule.init(learned)
    for _ in range(count):
        updates, state = rule.update(gradients, state, learned)
        learned = optax.apply_updates(learned, updates)
    return learned


def test_the_first_group_that_matches_the_whole_path_counts():
    groups = (("qformer/norm/.*", 0.5), ("qformer/.*", None), (".*", 1.0))
    assert group_of("qformer/norm/scale", groups) == ("qformer/norm/.*", 0.5)
    assert group_of("qformer/query_tokens", groups)[1] is None
    assert group_of("my/qformer/query_tokens", groups)[1] == 1.0


def test_split_and_merge_are_inverse():
    learned, frozen = split_params(PARAMS, (("(vision|llm)/.*", None), (".*", 1.0)))
    assert sorted(learned) == ["qformer/norm/scale", "qformer/query_tokens"]
    assert sorted(frozen) == ["llm/head/kernel", "vision/patch/bias", "vision/patch/kernel"]
    merged = join_params(learned, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ((("vision/.*", 1.0),), ["matches no expression", "optim.groups"]),
        ((("vison/.*", None), (".*", 1.0)), ["vison/.*", "llm, qformer, vision"]),
        (((".*", 1.0), ("llm/.*", None)), ["llm/.*", "left"]),
        (((".*", None),), ["freezes every parameter"]),
    ],
)
def test_groups_that_cannot_be_meant_are_refused(groups, words):
    with pytest.raises(UserError) as caught:
        split_params(PARAMS, groups)
    for word in words:
        assert word in str(caught.value)


def test_a_group_s_factor_multiplies_its_updates():
    learned, _ = split_params(PARAMS, ALL)
    gradients = jax.tree.map(jnp.ones_like, learned)
    groups = (("llm/.*", 0.25), (".*", 1.0))
    plain = steps(learned, optimizer(learned)[0], gradients, 3)
    scaled = steps(learned, optimizer(learned, groups)[0], gradients, 3)
    for name in learned:
        factor = 0.25 if name.startswith("llm") else 1.0
        np.testing.assert_allclose(
            scaled[name] - learned[name], factor * (plain[name] - learned[name]), rtol=2e-6
        )
        assert (plain[name] != learned[name]).all()


def test_weight_decay_spares_biases_and_norms():
    learned, _ = split_params(PARAMS, ALL)
    rule, _ = optimizer(learned, weight_decay=0.5)
    after = steps(learned, rule, jax.tree.map(jnp.zeros_like, learned), 3)
    for name in learned:
        spared = name.endswith(("bias", "scale"))
        assert ((after[name] == learned[name]) == spared).all(), name


def test_one_step_is_adamw_s():
    learned = {"a/kernel": jnp.array([[2.0, -1.0]])}
    rule, _ = optimizer(learned, warmup_steps=0, weight_decay=0.1)
    after = steps(learned, rule, {"a/kernel": jnp.array([[0.5, 1e-3]])})
    # The first moments cancel: sign(gradient) x rate, and decay by rate x 0.1 (Loshchilov 2019).
    expected = np.array([[2.0, -1.0]]) * (1 - 0.1 * 0.1) - 0.1
    np.testing.assert_allclose(after["a/kernel"], expected, rtol=1e-4)


def test_gradients_are_clipped_by_their_common_norm():
    learned = {"a/kernel": jnp.zeros((1, 2)), "b/kernel": jnp.zeros((1, 2))}
    big = {"a/kernel": jnp.full((1, 2), 3e3), "b/kernel": jnp.full((1, 2), 4e3)}
    small = jax.tree.map(lambda g: g / jnp.sqrt(2.0) / 5e3, big)
    rule, _ = optimizer(learned, clip_norm=1.0)
    clipped, state = rule.update(big, rule.init(learned), learned)
    unclipped, other = rule.update(small, rule.init(learned), learned)
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)
    assert jax.tree.structure(clipped) == jax.tree.structure(unclipped)


def test_the_schedule_warms_up_and_ends_at_zero():
    _, schedule = optimizer({"a/kernel": jnp.ones((1, 1))}, steps=100, warmup_steps=10)
    rates = np.array([float(schedule(step)) for step in range(101)])
    np.testing.assert_allclose(rates[:11], np.linspace(0, 0.1, 11), atol=1e-7)
    assert (np.diff(rates[10:]) < 0).all() and rates[100] == pytest.approx(0, abs=1e-8)
    assert rates[55] == pytest.approx(0.05, rel=1e-5)  # half a cosine


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 100), (2, 100), (5, 5)])
def test_a_run_of_a_few_steps_has_a_schedule(total, warmup):
    _, schedule = optimizer({"a/kernel": jnp.ones((1, 1))}, steps=total, warmup_steps=warmup)
    assert all(0 <= float(schedule(step)) <= 0.1000001 for step in range(total + 1))


def test_norms_are_told_by_part():
    gradients = {
        "llm/a": jnp.array([3.0]),
        "llm/b": jnp.array([4.0]),
        "vision/a": jnp.array([jnp.nan]),
    }
    norms = gradient_norms(gradients)
    assert sorted(norms) == ["llm", "vision"]
    assert float(norms["llm"]) == 5.0 and np.isnan(norms["vision"])
