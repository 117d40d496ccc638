"""The studies of ``benchmarks/suite.py`` are of what there is, at the sizes that they say."""

import pytest
from absl import flags

from adacm2_jax.config import as_fraction
from adacm2_jax.errors import UserError
from adacm2_jax.memory.policies import bound_of, settled
from adacm2_jax.runs.experiment import read
from adacm2_jax.runs.grid import Memory, memories_of
from benchmarks.suite import FAST, STUDIES, TRAINED_ON, checked, define_flags
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


def parsed(*given: str) -> flags.FlagValues:
    values = flags.FlagValues()
    define_flags(values)
    values(["suite.py", *given])
    return values


def test_flags_say_what_is_done(tmp_path):
    found = checked(parsed(f"--workdir={tmp_path}", "--seeds=3,0", "--studies=plane,long"))
    assert found == (tmp_path, [3, 0], ["plane", "long"])
    assert checked(parsed(f"--workdir={tmp_path}", "--fast"))[2] == FAST


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--studies=plane,sing", "--studies: sing is unknown; there are memories"),
        ("--studies=", "--studies is empty"),
        ("--studies=plane,plane", "--studies=plane,plane names one twice"),
        ("--seeds=1,x", "--seeds=1,x: 'x' is no number"),
        ("--seeds=", "--seeds is empty"),
        ("--seeds=1,01", "--seeds=1,1 names one twice"),
        ("--workdir=", "--workdir is empty"),
        ("--workdir=/dev/null/x", "--workdir=/dev/null/x: nothing can be written"),
    ],
)
def test_a_flag_that_says_nothing_is_refused_before_anything_is_trained(given, said):
    with pytest.raises(UserError) as error:
        checked(parsed(given))
    assert said in str(error.value)


def test_the_short_form_has_its_own_studies(tmp_path):
    with pytest.raises(UserError, match="--fast runs memories alone"):
        checked(parsed(f"--workdir={tmp_path}", "--fast", "--studies=plane"))
