"""The largest batch: few questions, and the right answer."""

import dataclasses

import pytest

from adacm2_jax.plan import search
from adacm2_jax.plan.report import compile_step
from adacm2_jax.plan.search import bracket, largest_batch
from adacm2_jax.plan.topology import CHIPS, parse_topology, topology_devices
from adacm2_jax.sharding import make_mesh
from tests.plan.small import small_plan


def asked(total, limit, start):
    """The answer, and the questions that it took."""
    questions: list[int] = []

    def answer(times):
        questions.append(times)
        return total(times)

    return bracket(answer, limit, start), questions


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 30, 49])
@pytest.mark.parametrize("start", [1, 4, 32])
def test_where_memory_is_a_constant_and_so_much_a_row_neighbours_are_found_at_once(most, start):
    found, questions = asked(lambda times: 5000 + 37 * times, 5000 + 37 * most + 20, start)
    assert found == (most, most + 1)
    assert len(questions) == len(set(questions)) <= 5


def test_a_large_answer_is_found_to_a_share_of_it():
    (low, high), questions = asked(lambda times: 10**6 + 999 * times, 2 * 10**6, 16)
    assert low <= 10**6 // 999 < high <= low * (1 + search.GRAIN)
    assert len(questions) <= 6


@pytest.mark.parametrize("most", [1, 5, 40, 41, 75, 112, 300])
@pytest.mark.parametrize("start", [1, 4, 64])
def test_a_line_that_bends_is_followed(most, start):
    """Flat at first, where other phases of the step need more; steeper where XLA pads."""

    def total(times):
        return max(6000 + 3 * times, 5500 + 90 * times + (700 if times > 40 else 0))

    found, questions = asked(total, total(most), start)
    low, high = found
    assert total(low) <= total(most) < total(high)
    assert high - low <= max(1, search.GRAIN * low) and {low, high} <= {0, *questions}
    assert len(questions) <= search.SECANTS + 5


def test_a_refused_program_whose_need_does_not_grow_is_closed_in_upon():
    """What XLA says of a program that does not fit need not be above the one before."""
    (low, high), questions = asked(lambda times: 10 * times if times < 60 else 700, 599, 8)
    assert (low, high) == (59, 60) and len(questions) <= search.SECANTS + 6


def test_the_compiler_is_asked_for_rows_that_divide(monkeypatch):
    topology = parse_topology("v5e:1x2")
    mesh = make_mesh((2, 1), topology_devices(topology))
    first = compile_step(small_plan("decode"), topology, mesh)
    # As if the device had a little more memory than the step needs.
    little = dataclasses.replace(CHIPS["v5e"], hbm=first.memory.total + 2**18)
    monkeypatch.setitem(CHIPS, "v5e", little)
    found = largest_batch(first, topology, mesh)
    fits, too_large = found["largest_batch"], found["too_large_batch"]
    assert 4 <= fits == too_large - 2 and fits % 2 == 0
    larger = dataclasses.replace(first.plan, batch=too_large)
    assert compile_step(larger, topology, mesh).memory.total > little.hbm
