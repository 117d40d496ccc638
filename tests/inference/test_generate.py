"""The search itself, on language models small enough to know everything about."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.special import log_softmax

from adacm2_jax.config import LlamaConfig
from adacm2_jax.errors import UserError
from adacm2_jax.inference.generate import Generated, GenerationConfig, nucleus, search
from adacm2_jax.models.llama import KVCache, init_cache

EOS, PAD = 2, 0


def sequences(generated: Generated, row: int) -> list[tuple[int, ...]]:
    return [
        tuple(np.asarray(ids[:length]).tolist())
        for ids, length in zip(generated.ids[row], generated.lengths[row], strict=True)
    ]


def chain(table: np.ndarray):
    """A Markov chain as a language model: row i of ``table`` are the logits after token i."""
    table = jnp.asarray(table, jnp.float32)
    return lambda ids, cache: (table[ids], cache)


def no_cache(batch: int) -> KVCache:
    return init_cache(
        LlamaConfig(width=8, depth=1, num_heads=1, num_kv_heads=1), batch, 1, "float32"
    )


@functools.partial(jax.jit, static_argnames="config")
def search_table(table, logits, config, rng):
    return search(logits, no_cache(len(logits)), chain(table), config, rng)


def search_chain(table, first, config: GenerationConfig, batch: int = 1, rng=None) -> Generated:
    """Answers of the chain that starts as if token ``first`` had just been read."""
    table = jnp.asarray(table, jnp.float32)
    logits = jnp.broadcast_to(table[first], (batch, len(table)))
    return search_table(table, logits, config, rng)


def random_table(vocabulary: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(vocabulary, vocabulary))


def plain_beam_search(log_probs, first, config: GenerationConfig):
    """The rules, on lists: best first, (score, tokens) of at most ``num_beams`` sequences."""
    beams, open_ones, ended = config.num_beams, [(0.0, ())], []
    for length in range(1, config.max_new_tokens + 1):
        candidates = sorted(
            (
                (score + log_probs[length - 1, (first, *prefix)[-1], token], (*prefix, token))
                for score, prefix in open_ones
                for token in range(log_probs.shape[-1])
            ),
            reverse=True,
        )
        ends = [
            tokens[-1] in config.eos_ids or length == config.max_new_tokens
            for _, tokens in candidates
        ]
        norm = length**config.length_penalty
        for (score, tokens), end in zip(candidates[:beams], ends, strict=False):
            if end:
                ended.append((score / norm, tokens))
        ended = sorted(ended, reverse=True)[:beams]
        open_ones = [one for one, end in zip(candidates, ends, strict=True) if not end][:beams]
        if len(ended) == beams and not (open_ones and open_ones[0][0] / norm > ended[-1][0]):
            break
    return ended


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_beams_follow_the_rules_of_a_plain_beam_search(length_penalty):
    """120 answers of chains in which ends are likely and places among the beams are short.

    The chains change with time: in one that does not, sequences that take the same steps in another
    order tie exactly.
    """
    config = GenerationConfig(
        9, 0, num_beams=3, num_return=3, length_penalty=length_penalty, eos_ids=(EOS, 5)
    )

    @jax.jit
    def answer(tables):
        def decode(ids, cache):
            time = cache.index + 1
            return tables[time, ids], dataclasses.replace(cache, index=time)

        return search(tables[0], no_cache(12), decode, config)

    for seed in range(10):
        tables = np.random.default_rng(seed).normal(scale=2, size=(9, 12, 12)).astype("f4")
        found = answer(tables)
        for first in range(12):
            expected = plain_beam_search(
                log_softmax(tables.astype(np.float64), axis=-1), first, config
            )
            assert sequences(found, first) == [tokens for _, tokens in expected]
            np.testing.assert_allclose(
                found.scores[first], [score for score, _ in expected], rtol=1e-6, atol=1e-5
            )


def test_a_wider_search_finds_what_greedy_misses():
    """After A (0.6) everything is a coin toss; after B (0.4) the end is certain."""
    a, b, end = 0, 1, 2
    probs = np.array([[0.3, 0.3, 0.4], [0.0, 0.0, 1.0], [0.6, 0.4, 0.0]])
    table = np.log(probs + 1e-30)
    config = GenerationConfig(2, eos_ids=(end,), length_penalty=0.0)
    greedy = search_chain(table, end, config)
    beams = search_chain(table, end, dataclasses.replace(config, num_beams=2, num_return=2))
    assert sequences(greedy, 0) == [(a, end)]
    assert sequences(beams, 0) == [(b, end), (a, end)]
    np.testing.assert_allclose(np.exp(beams.scores[0]), [0.4, 0.24], rtol=1e-5)


SEARCHES = {
    "greedy": dict(),
    "beams": dict(num_beams=3, num_return=3),
    "sampled": dict(temperature=0.7),
}


@pytest.mark.parametrize("kind", SEARCHES)
def test_answers_end_between_the_least_and_the_greatest_length(kind):
    """The end token is all but certain, so an answer ends as soon as it may."""
    table = random_table(12)
    table[:, EOS] = 50
    for least, most in [(0, 5), (3, 5), (4, 4)]:
        config = GenerationConfig(most, least, **SEARCHES[kind], eos_ids=(EOS,), pad_id=9)
        found = search_chain(table, 5, config, batch=2, rng=jax.random.key(0))
        assert found.ids.shape == (2, config.num_return, most)
        assert (np.asarray(found.lengths)[:, 0] == min(least + 1, most)).all()
        for row, rank in itertools.product(range(2), range(config.num_return)):
            length = int(found.lengths[row, rank])
            ids = np.asarray(found.ids[row, rank])
            assert EOS not in ids[: min(least, length)]
            assert EOS not in ids[: length - 1]
            assert ids[length - 1] == EOS or length == most
            assert (ids[length:] == 9).all()


@pytest.mark.parametrize("kind", SEARCHES)
def test_without_an_end_token_answers_are_as_long_as_allowed(kind):
    config = GenerationConfig(6, **SEARCHES[kind], eos_ids=())
    found = search_chain(random_table(12), 5, config, rng=jax.random.key(0))
    assert (np.asarray(found.lengths) == 6).all()


def test_decoding_stops_when_every_row_has_ended():
    """Row 0 ends at once, row 1 with its third token: two more steps, not sixty-three."""
    steps = []
    table = np.full((5, 5), -50.0)
    table[3, 4] = table[4, EOS] = 50
    decode = chain(table)

    def counted(ids, cache):
        jax.debug.callback(lambda ids: steps.append(ids.tolist()), ids, ordered=True)
        return decode(ids, cache)

    logits = jnp.asarray([[0, 0, 9, 0, 0], [0, 0, 0, 9, 0]], jnp.float32)
    config = GenerationConfig(64, min_new_tokens=0, eos_ids=(EOS,), pad_id=PAD)
    found = jax.jit(lambda x: search(x, no_cache(2), counted, config))(logits)
    jax.effects_barrier()
    assert [sequences(found, row) for row in range(2)] == [[(EOS,)], [(3, 4, EOS)]]
    assert steps == [[EOS, 3], [PAD, 4]]


def test_samples_are_distributed_as_the_model_says():
    """Two tokens of a chain, 20 000 times; a fit this bad has probability 1e-6 by chance."""
    rows, temperature, vocabulary = 20_000, 1.7, 5
    table = random_table(vocabulary)
    probs = np.exp(log_softmax(table / temperature, axis=-1))
    config = GenerationConfig(2, temperature=temperature, eos_ids=())
    found = search_chain(table, 3, config, rows, jax.random.key(4))
    ids = np.asarray(found.ids[:, 0])
    expected = (probs[3][:, None] * probs).ravel()
    counts = np.bincount(ids[:, 0] * vocabulary + ids[:, 1], minlength=vocabulary**2)
    statistic = ((counts - rows * expected) ** 2 / (rows * expected)).sum()
    assert statistic < scipy.stats.chi2.isf(1e-6, vocabulary**2 - 1)
    log_probs = np.log(probs[3][ids[:, 0]] * probs[ids[:, 0], ids[:, 1]])
    np.testing.assert_allclose(found.scores[:, 0], log_probs / 2, atol=1e-5)


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9])
def test_top_p_samples_from_the_smallest_set_that_reaches_it(top_p):
    table = np.log(np.random.default_rng(2).permutation([0.4, 0.25, 0.2, 0.1, 0.05]))[None]
    probs = np.exp(table[0])
    smallest = min(
        (
            subset
            for size in range(1, 6)
            for subset in itertools.combinations(range(5), size)
            if probs[list(subset)].sum() >= top_p
        ),
        key=lambda subset: (len(subset), -probs[list(subset)].sum()),
    )
    config = GenerationConfig(1, 0, temperature=1.0, top_p=top_p, eos_ids=())
    found = search_chain(np.repeat(table, 5, 0), 0, config, 2000, jax.random.key(1))
    # A token of probability 0.1 or more is missed by 2000 samples with probability 1e-91.
    assert set(np.asarray(found.ids).ravel().tolist()) == set(smallest)


def test_top_p_breaks_ties_by_the_lower_id_and_always_keeps_one():
    equal = jnp.zeros((1, 4))
    for top_p, kept in [(0.01, 1), (0.4, 2), (0.6, 3), (1.0, 4)]:
        assert np.isfinite(nucleus(equal, top_p))[0].tolist() == [True] * kept + [False] * (
            4 - kept
        )
    # As in a program that is compiled once for every value: float32 makes 0 of this one.
    one = nucleus(jnp.array([[1.0, 3.0, 2.0]]), jnp.float32(1e-50))
    assert np.isfinite(one)[0].tolist() == [False, True, False]


def test_samples_repeat_by_key_and_differ_between_keys_and_rows():
    table, config = np.zeros((20, 20)), GenerationConfig(8, temperature=1.0, eos_ids=())
    draw = functools.partial(search_chain, table, 0, config, 4)
    ids = np.asarray(draw(jax.random.key(0)).ids)
    np.testing.assert_array_equal(ids, draw(jax.random.key(0)).ids)
    assert not np.array_equal(ids, draw(jax.random.key(1)).ids)
    assert len({row.tobytes() for row in ids}) == 4


def test_with_a_key_of_its_own_a_row_is_sampled_alike_in_every_batch():
    table, config = random_table(20), GenerationConfig(8, temperature=1.0, eos_ids=())
    keys = jax.random.split(jax.random.key(7), 4)
    together = search_chain(table, 0, config, 4, keys)
    order = np.array([3, 1])
    apart = search_chain(table, 0, config, 2, keys[order])
    np.testing.assert_array_equal(together.ids[order], apart.ids)


def test_one_key_gives_row_i_the_same_answer_in_every_batch():
    table, config = random_table(20), GenerationConfig(8, temperature=1.0, eos_ids=())
    key = jax.random.key(3)
    few, many = (search_chain(table, 0, config, batch, key) for batch in (2, 4))
    np.testing.assert_array_equal(few.ids, many.ids[:2])


def test_equal_configurations_are_traced_once():
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def answer(config, logits):
        traced.append(config)
        return search(logits, no_cache(2), chain(np.zeros((6, 6))), config)

    for seed in range(3):
        answer(GenerationConfig(4, num_beams=2), jax.random.normal(jax.random.key(seed), (2, 6)))
    assert len(traced) == 1
    answer(GenerationConfig(4, num_beams=2, eos_ids=[2]), jnp.zeros((2, 6)))
    assert len(traced) == 1, "a list of end tokens is the same configuration"
    answer(GenerationConfig(4, num_beams=3), jnp.zeros((2, 6)))
    assert len(traced) == 2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(max_new_tokens=0), "max_new_tokens must .* at least 1, not 0"),
        (dict(max_new_tokens=2.0), "max_new_tokens must .* not 2.0"),
        (dict(num_beams=True), "num_beams must .* not True"),
        (dict(min_new_tokens=-1), "min_new_tokens must .* not -1"),
        (dict(min_new_tokens=17), "min_new_tokens = 17 exceeds max_new_tokens = 16; lower"),
        (dict(num_return=2), "num_return = 2 exceeds num_beams = 1; raise"),
        (dict(num_return=0), "num_return must .* not 0"),
        (dict(pad_id=-1), "pad_id must .* not -1"),
        (dict(repetition_penalty=0.0), "repetition_penalty must be above 0 .* not 0.0"),
        (dict(length_penalty=float("nan")), "length_penalty must be finite, not nan"),
        (dict(length_penalty="1"), "length_penalty must be a number, not '1'"),
        (dict(temperature=-0.5), "temperature must .* not -0.5"),
        (dict(temperature=1.0, top_p=0.0), r"top_p must be in \(0, 1\], not 0.0"),
        (dict(temperature=1.0, top_p=1.5), r"top_p must be in \(0, 1\], not 1.5"),
        (dict(temperature=1.0, num_beams=5), "temperature = 1.0 samples, .* num_beams = 5 .*; set"),
        (dict(top_p=0.9), "top_p = 0.9 acts on sampling alone; set temperature"),
        (dict(eos_ids=2), "eos_ids must be a tuple .* not 2"),
        (dict(eos_ids=(2, -1)), r"eos_ids must be a tuple .* not \(2, -1\)"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(fields, named):
    with pytest.raises(UserError, match=named) as error:
        GenerationConfig(**fields)
    assert "\n" not in str(error.value)


def test_end_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(UserError, match=r"eos_ids holds 9, .* has 6 tokens"):
        search_chain(np.zeros((6, 6)), 0, GenerationConfig(eos_ids=(2, 9)))
    with pytest.raises(UserError, match=r"eos_ids = \(0, 1\) leave no other token .* of 2"):
        search_chain(np.zeros((2, 2)), 0, GenerationConfig(eos_ids=(0, 1)))


def test_sampling_without_a_fitting_key_is_refused():
    config = GenerationConfig(temperature=0.5)
    with pytest.raises(UserError, match=r"temperature = 0.5 samples and needs rng; pass jax"):
        search_chain(np.zeros((6, 6)), 0, config)
    for rng in (jax.random.PRNGKey(0), jax.random.split(jax.random.key(0), 3)):
        with pytest.raises(UserError, match=r"rng is .*; pass jax.random.key\(seed\), or 2 such"):
            search_chain(np.zeros((6, 6)), 0, config, batch=2, rng=rng)
