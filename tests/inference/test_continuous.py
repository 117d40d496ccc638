"""Answers that begin and end at any time are those that each question gets by itself."""

import dataclasses

import jax
import numpy as np
import pytest

from adacm2_jax.inference import continuous
from adacm2_jax.inference.generate import GenerationConfig, generate
from adacm2_jax.models.adacm2 import Question
from tests.inference.test_generate_model import EOS, whole_model

OPTIONS = GenerationConfig(max_new_tokens=9, eos_ids=(EOS,), repetition_penalty=1.3)
WIDTH = 8
#: temperature, top_p of each of the three questions.
DRAWN = ((0.0, 1.0), (1.5, 1.0), (0.9, 0.7))


def asked(question: Question, row: int, width: int) -> Question:
    """One question, padded on the left to another width."""
    lack = width - question.llm_ids.shape[1]
    return jax.tree.map(
        lambda leaf: np.pad(np.asarray(leaf)[row : row + 1], ((0, 0), (lack, 0))), question
    )


def alone(row: int, temperature: float, top_p: float, options=OPTIONS) -> tuple[list[int], float]:
    """What ``generate`` writes for one question."""
    model, params, queries, question = whole_model(31)
    config = dataclasses.replace(options, temperature=temperature, top_p=top_p)
    key = jax.random.key(row)[None] if temperature else None
    one = jax.tree.map(lambda leaf: np.asarray(leaf)[row : row + 1], question)
    found = jax.jit(generate, static_argnums=(0, 4))(
        model, params, queries[row : row + 1], one, config, key
    )
    length = int(found.lengths[0, 0])
    return np.asarray(found.ids)[0, 0, :length].tolist(), float(found.scores[0, 0])


def begun(row: int, temperature: float, top_p: float, width: int):
    model, params, queries, question = whole_model(31)
    return continuous.begin(
        model,
        params,
        queries[row : row + 1],
        asked(question, row, width),
        temperature,
        top_p,
        jax.random.key(row),
        WIDTH,
        OPTIONS,
    )


def test_answers_that_begin_at_different_times_are_those_of_each_alone():
    """Five questions in three places: a place is taken again when its answer ends."""
    model, params, _, _ = whole_model(31)
    table = continuous.empty(model, 3, WIDTH, OPTIONS)
    waiting = [(0, *DRAWN[0]), (1, *DRAWN[1]), (2, *DRAWN[2]), (1, *DRAWN[0]), (0, *DRAWN[2])]
    running, written, done = {}, {}, {}
    number = 0
    while waiting or running:
        for place in range(3):
            # One comes every second step, into prompts of different widths.
            if place not in running and waiting and number % 2 == 0:
                job = waiting.pop(0)
                row, first = begun(*job, width=6 + number % 3)
                table = continuous.put(table, place, row)
                written[job] = [int(first.token)]
                if bool(first.ended):
                    done[job] = float(first.score)
                else:
                    running[place] = job
                break
        number += 1
        table, new = continuous.advance(model, params, table, OPTIONS)
        for place, job in list(running.items()):
            written[job].append(int(new.token[place]))
            if bool(new.ended[place]):
                done[job] = float(new.score[place])
                del running[place]
    assert len(done) == 5
    for job, score in done.items():
        ids, expected = alone(*job)
        assert written[job] == ids, job
        # A sum of at most 9 float32 log-probabilities, each rounded in other products.
        assert score == pytest.approx(expected, rel=1e-4, abs=1e-4), job


def test_steps_are_compiled_once_whatever_comes():
    model, params, _, _ = whole_model(31)
    table = continuous.empty(model, 3, WIDTH, OPTIONS)
    continuous.advance.clear_cache()
    for place in range(3):
        row, _ = begun(place, *DRAWN[place], width=8)
        table = continuous.put(table, place, row)
        table, _ = continuous.advance(model, params, table, OPTIONS)
    assert continuous.advance._cache_size() == 1


def test_a_full_row_writes_nothing_more():
    model, params, _, _ = whole_model(31)
    never = dataclasses.replace(OPTIONS, eos_ids=())
    table = continuous.empty(model, 1, WIDTH, never)
    _, params, queries, question = whole_model(31)
    row, _ = continuous.begin(
        model, params, queries[:1], asked(question, 0, 8), 0.0, 1.0, jax.random.key(0), WIDTH, never
    )
    table = continuous.put(table, 0, row)
    for _ in range(8):
        table, new = continuous.advance(model, params, table, never)
    assert bool(new.ended[0])
    before = np.asarray(table.ids), np.asarray(table.score)
    table, new = continuous.advance(model, params, table, never)
    np.testing.assert_array_equal(table.ids, before[0])
    np.testing.assert_array_equal(table.score, before[1])


def test_what_is_next_to_nothing_makes_no_nan():
    """A top_p and a temperature that float32 rounds to 0, or to what no logit can be divided by."""
    _, plain = begun(0, *DRAWN[0], width=8)
    for temperature, top_p in ((1.0, 1e-50), (1e-40, 1.0), (1e-50, 0.5)):
        _, written = begun(0, temperature, top_p, width=8)
        assert int(written.token) == int(plain.token) and np.isfinite(written.score)
