"""The studies of ``benchmarks/suite.py`` are of what there is, at the sizes that they say."""

import pytest

from adacm2_jax.config import as_fraction
from adacm2_jax.memory.policies import bound_of, settled
from adacm2_jax.runs.experiment import read
from adacm2_jax.runs.grid import Memory, memories_of
from benchmarks.suite import STUDIES, TRAINED_ON
from configs import suite
from data.suite.plan import TASKS, chance_without_time
from data.suite.styles import STYLES


def experiment(change=None):
    config = suite.get_config()
    if change:
        change(config)
    return read(config)


@pytest.mark.parametrize("name", STUDIES)
def test_studies_hold_equal_tokens(name):
    study = STUDIES[name]
    assert set(study.tasks) <= set(TASKS) and set(study.styles) <= set(STYLES)
    given = experiment()
    tokens = given.model.vision.tokens_per_frame
    memories = [Memory.parse(text) for text in study.memories]
    for frames in study.frames:
        found = memories_of(memories, given, frames, [study.tokens])
        for memory in memories:
            label = memory.label if memory.is_sized() else f"{memory.label} @{study.tokens}"
            config = found[label]
            if config.policy in ("full", "recent_frames", "merge"):
                continue  # whole frames, never fewer
            shares = config.conserve_ratio
            for share in shares if isinstance(shares, tuple) else (shares,):
                held = settled(tokens, as_fraction(config.recent_ratio), as_fraction(share))
                if isinstance(shares, tuple):
                    assert held in (17, 51)
                else:
                    assert held == study.tokens


def test_layers_of_different_size_hold_as_much_together():
    for memory in map(Memory.parse, STUDIES["components"].memories):
        if memory.label.startswith("layers"):
            assert sum(map(int, memory.label[6:].split("_"))) == 2 * STUDIES["components"].tokens


@pytest.mark.parametrize("name", TRAINED_ON)
def test_what_is_trained_on_sees_as_many_frames_of_each_step(name):
    found = experiment(TRAINED_ON[name])
    assert found.train.batch_size * found.train.num_frames == 512
    assert found.data.suite.train_size == found.train.batch_size * found.train.steps
    if found.model.memory.policy == "adacm2":
        assert bound_of(found.model) < found.train.num_frames * 17 / 16


def test_order_and_change_need_time():
    assert chance_without_time("order") == chance_without_time("change") == 0.5
