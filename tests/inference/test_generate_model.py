"""The whole model's answers, each scored again without the cache that it was decoded with."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from adacm2_jax.config import LlamaConfig, tiny
from adacm2_jax.errors import UserError
from adacm2_jax.inference.generate import Generated, GenerationConfig, generate
from adacm2_jax.models.adacm2 import AdaCM2, Question, init_params

EOS, PAD = 2, 0
#: Three questions, padded on the left.
WORDS = np.array([6, 2, 4])
#: What is rescored at a time: texts, and the longest of them with its prompt.
ROWS, PLACES = 9, 14


@functools.cache
def whole_model(vocabulary: int):
    """A model with sharp, random answers; its parameters; three states and questions."""
    llm = LlamaConfig(
        vocab_size=vocabulary,
        width=32,
        depth=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_width=64,
        max_positions=64,
    )
    model = AdaCM2(tiny(llm=llm, max_text_len=8))
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(init_params, model.config), jax.random.key(0))
    params = jax.tree.map(
        lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype("f4"), nn.unbox(shapes)
    )
    batch, config = len(WORDS), model.config.qformer
    queries = rng.normal(size=(batch, config.num_queries, config.width)).astype("f4") * 10
    ids = rng.integers(vocabulary, size=(batch, WORDS.max())).astype(np.int32)
    mask = np.arange(WORDS.max()) >= WORDS.max() - WORDS[:, None]
    return model, params, queries, Question(ids, mask, ids, mask)


run = jax.jit(generate, static_argnums=(0, 4))


@functools.partial(jax.jit, static_argnums=0)
def first_logits(model, params, queries, question):
    length = model.config.qformer.num_queries + question.llm_ids.shape[1]
    return model.apply({"params": params}, queries, question, length, method="prefill")[0]


class Rescorer:
    """Log-probabilities by the whole sequence at once, without any cache that is carried along."""

    def __init__(self, vocabulary: int):
        self.model, self.params, self.queries, self.question = whole_model(vocabulary)

    def logits(self, row: int, prefixes: list[tuple[int, ...]]) -> np.ndarray:
        """float64[n, vocabulary] after the prompt of a row and each of n equally long prefixes."""
        words = self.question.llm_ids[row][self.question.llm_mask[row]]
        texts = [[*words, *prefix] for prefix in prefixes]
        # Always the same shape, so that it is compiled once.
        ids = np.zeros((ROWS, PLACES), np.int32)
        ids[: len(texts), -len(texts[0]) :] = texts
        mask = np.broadcast_to(np.arange(PLACES) >= PLACES - len(texts[0]), ids.shape)
        queries = jnp.broadcast_to(self.queries[row], (ROWS, *self.queries.shape[1:]))
        question = Question(ids, mask, ids, mask)
        logits = first_logits(self.model, self.params, queries, question)
        return np.asarray(logits[: len(texts)], np.float64)

    def processed(self, row: int, prefixes, config: GenerationConfig) -> np.ndarray:
        """The log-probabilities that beam search adds up."""
        scores = log_softmax(self.logits(row, prefixes), axis=-1)
        for prefix, line in zip(prefixes, scores, strict=True):
            for token in set(prefix):
                line[token] *= config.repetition_penalty
            if len(prefix) < config.min_new_tokens:
                line[list(config.eos_ids)] = -np.inf
        return scores

    def all_sequences(self, row: int, config: GenerationConfig) -> dict[tuple[int, ...], float]:
        """Every sequence that can be generated, and its score."""
        found, open_ones = {}, {(): 0.0}
        for length in range(1, config.max_new_tokens + 1):
            scores = self.processed(row, list(open_ones), config)
            longer = {}
            for (prefix, score), line in zip(open_ones.items(), scores, strict=True):
                for token in np.flatnonzero(np.isfinite(line)):
                    ended = token in config.eos_ids or length == config.max_new_tokens
                    total = score + line[token]
                    if ended:
                        found[(*prefix, int(token))] = total / length**config.length_penalty
                    else:
                        longer[(*prefix, int(token))] = total
            open_ones = longer
        return found


def sequences(generated: Generated, row: int) -> list[tuple[int, ...]]:
    return [
        tuple(np.asarray(ids[:length]).tolist())
        for ids, length in zip(generated.ids[row], generated.lengths[row], strict=True)
    ]


def test_greedy_takes_the_likeliest_token_of_the_whole_sequence_each_time():
    penalty = 1.5
    config = GenerationConfig(8, min_new_tokens=3, repetition_penalty=penalty, eos_ids=(EOS, 7, 11))
    found = run(*whole_model(20), config)
    rescorer = Rescorer(20)
    for row in range(len(WORDS)):
        prefix, total = (), 0.0
        while len(prefix) < config.max_new_tokens and not set(prefix) & set(config.eos_ids):
            logits = rescorer.logits(row, [prefix])[0]
            for token in set(prefix):
                logits[token] *= penalty if logits[token] < 0 else 1 / penalty
            if len(prefix) < config.min_new_tokens:
                logits[list(config.eos_ids)] = -np.inf
            token = int(logits.argmax())
            total += log_softmax(logits)[token]
            prefix = (*prefix, token)
        assert sequences(found, row) == [prefix]
        assert (np.asarray(found.ids[row, 0, len(prefix) :]) == config.pad_id).all()
        np.testing.assert_allclose(found.scores[row, 0], total / len(prefix), atol=1e-5)


@pytest.mark.parametrize(("length_penalty", "penalty", "least"), [(1.0, 1.0, 0), (-1.0, 1.5, 2)])
def test_beams_as_many_as_sequences_find_all_in_order(length_penalty, penalty, least):
    """4 tokens, 3 places: 1 + 3 + 9·4 sequences; without the two shorter kinds 36."""
    config = GenerationConfig(
        3,
        min_new_tokens=least,
        num_beams=45,
        num_return=45,
        length_penalty=length_penalty,
        repetition_penalty=penalty,
        eos_ids=(EOS,),
        pad_id=PAD,
    )
    found = run(*whole_model(4), config)
    rescorer = Rescorer(4)
    for row in range(len(WORDS)):
        expected = rescorer.all_sequences(row, config)
        assert len(expected) == (36 if least else 40)
        got = sequences(found, row)
        real, empty = got[: len(expected)], got[len(expected) :]
        assert set(real) == set(expected)
        scores = np.asarray(found.scores[row])
        np.testing.assert_allclose(
            scores[: len(real)], [expected[sequence] for sequence in real], rtol=1e-6, atol=1e-5
        )
        assert (np.diff(scores[: len(real)]) <= 0).all()
        # There are no more sequences: the other places stay empty, and are no copies.
        assert set(empty) == {()} and (scores[len(real) :] == -np.inf).all()


def test_every_beam_has_the_score_of_its_own_tokens():
    """Were the cache not reordered with its beams, scores would be those of other sequences."""
    config = GenerationConfig(
        7, num_beams=4, num_return=4, repetition_penalty=1.5, length_penalty=0.5, eos_ids=(EOS, 7)
    )
    found = run(*whole_model(20), config)
    rescorer = Rescorer(20)
    moved = 0
    for row in range(len(WORDS)):
        answers = sequences(found, row)
        assert len(set(answers)) == config.num_beams
        # A shared beginning after another first choice: the beams did change places.
        moved += len({answer[:2] for answer in answers}) < config.num_beams
        for answer, score in zip(answers, found.scores[row], strict=True):
            total = sum(
                rescorer.processed(row, [answer[:i]], config)[0, token]
                for i, token in enumerate(answer)
            )
            expected = total / len(answer) ** config.length_penalty
            np.testing.assert_allclose(score, expected, rtol=1e-6, atol=1e-5)
    assert moved


def test_an_answer_depends_neither_on_the_rows_beside_it_nor_on_padding():
    model, params, queries, question = whole_model(20)
    config = GenerationConfig(
        6, num_beams=3, num_return=3, eos_ids=(EOS, 7), repetition_penalty=1.5
    )
    together = run(model, params, queries, question, config)
    order, padding = np.array([2, 1]), WORDS.max() - WORDS[[1, 2]].max()
    some = jax.tree.map(lambda leaf: leaf[order, padding:], question)
    apart = run(model, params, queries[order], some, config)
    np.testing.assert_array_equal(together.ids[order], apart.ids)
    np.testing.assert_allclose(together.scores[order], apart.scores, rtol=1e-6, atol=1e-5)


def test_an_answer_longer_than_the_model_reaches_is_refused():
    with pytest.raises(UserError, match=r"max_new_tokens = 55 after 10 places .* = 64; lower"):
        run(*whole_model(20), GenerationConfig(55))
