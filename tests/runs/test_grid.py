"""A grid's memories and fields, as a command line writes them."""

import dataclasses

import pytest

from adacm2_jax.config import MemoryConfig
from adacm2_jax.errors import UserError
from adacm2_jax.runs.grid import Memory, memories_of, overridden, value_of, varied
from tests.small import small_experiment

EXPERIMENT = small_experiment()
TOKENS = EXPERIMENT.model.vision.tokens_per_frame  # 5


def memories(*texts, tokens=(), frames=8) -> dict[str, MemoryConfig]:
    return memories_of([Memory.parse(text) for text in texts], EXPERIMENT, frames, tokens)


def test_a_memory_is_its_policy_and_what_differs_from_the_run():
    found = memories("adacm2", "slow=adacm2:decay=0.5:score_rows=text", "budget:capacity=9")
    assert list(found) == ["adacm2", "slow", "budget:capacity=9"]
    run = EXPERIMENT.model.memory
    assert found["adacm2"] == run
    assert found["slow"] == dataclasses.replace(run, decay=0.5, score_rows="text")
    assert found["budget:capacity=9"].capacity == 9
    qformer = dataclasses.replace(EXPERIMENT.model.qformer, depth=4)  # two cross-attention layers
    model = dataclasses.replace(EXPERIMENT.model, qformer=qformer)
    experiment = dataclasses.replace(EXPERIMENT, model=model)
    by_layer = Memory.parse("layers=adacm2:recent_ratio=0.1,0.2")
    found = memories_of([by_layer], experiment, 8, ())
    assert found["layers"].recent_ratio == ("0.1", "0.2")


def test_what_names_no_size_holds_as_much_as_the_run_rounded_up():
    # ρ = 0.3 and β = 0.5 keep at most ⌊5 · 0.65 / 0.35⌋ = 9 tokens: two frames of five.
    found = memories("budget", "merge", "recent_frames", "full")
    assert found["budget"].capacity == 9
    assert found["merge"].bank_frames == 2
    assert found["recent_frames"].recent_frames == 3  # two that are held, and the newest
    assert found["full"].max_frames == 8


def test_sizes_are_those_that_are_asked_for():
    found = memories("adacm2", "random", "recent_frames", "merge", "full", tokens=(4, 13))
    assert list(found) == [
        *("adacm2 @4", "adacm2 @13", "random @4", "random @13"),
        *("recent_frames @4", "recent_frames @13", "merge @4", "merge @13", "full"),
    ]
    assert [found[f"recent_frames @{n}"].recent_frames for n in (4, 13)] == [2, 4]
    assert [found[f"merge @{n}"].bank_frames for n in (4, 13)] == [1, 3]
    both = found["adacm2 @4"], found["random @4"]
    assert both[0].conserve_ratio == both[1].conserve_ratio
    fixed = memories("last=recent_frames:recent_frames=2", tokens=(4, 13))
    assert list(fixed) == ["last"]


@pytest.mark.parametrize(
    ("texts", "tokens", "said"),
    [
        (["newest"], (), "policy 'newest' is unknown; there are adacm2"),
        (["adacm2:ratio=1"], (), "memory.ratio is unknown; there are bank_frames"),
        (["adacm2:decay"], (), "must be POLICY or LABEL=POLICY:FIELD=VALUE"),
        (["adacm2:decay=2"], (), r"memory.decay must be in \[0, 1\]"),
        (["adacm2", "adacm2"], (), "--memory adacm2 is there twice"),
        (["adacm2:recent_ratio=0.1,0.2"], (), "--memory .*: memory.recent_ratio has 2 values, but"),
        (["adacm2:decay=nan"], (), "--memory adacm2:decay=nan: memory.decay must be float"),
        (["recent_frames:recent_frames=1.5"], (), "memory.recent_frames must be int, not 1.5"),
        (["adacm2:decay=0.5:decay=0.6"], (), "memory.decay is there twice"),
        (["full:recent_frames=3"], (), "memory.recent_frames is of another policy"),
        (["recent_frames:recent_frames=2000000000"], (), "10,000,000,000 tokens .* GB of memory"),
        (["a\nb=adacm2"], (), "must be POLICY or LABEL=POLICY"),
        (["adacm2"], (12,), "settles at 12 tokens; the nearest is 13"),
        (["adacm2:recent_ratio=0.1,0.2"], (4,), "needs one memory.recent_ratio"),
    ],
)
def test_a_memory_that_cannot_be_is_named(texts, tokens, said):
    with pytest.raises(UserError, match=said) as caught:
        memories(*texts, tokens=tokens)
    assert "\n" not in str(caught.value)


def test_fields_vary_in_all_combinations():
    assert varied([]) == [{}]
    assert varied(["a.b=x,y", "c=1"]) == [{"a.b": "x", "c": 1}, {"a.b": "y", "c": 1}]
    # Commas within brackets are a value's own.
    assert varied(["a=(0,7),(8,15)"]) == [{"a": (0, 7)}, {"a": (8, 15)}]
    assert varied(["a=(0,7"]) == [{"a": "(0"}, {"a": 7}]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a.b"], "--vary a.b must be FIELD=VALUE"),
        (["a=1,2,1"], "--vary a=1,2,1 has 1 2 times"),
        (["a=1", "a=2"], "--vary a=2: a varies already"),
    ],
)
def test_what_cannot_vary_is_named(given, said):
    with pytest.raises(UserError, match=said):
        varied(given)


def test_a_value_that_python_cannot_read_is_text():
    for text in ("{[1]: 2}", "-" * 100_000 + "1", "(" * 3000, "1e", ""):
        assert value_of(text) == text
    assert (value_of("(0, 7)"), value_of("1e3"), value_of("None")) == ((0, 7), 1e3, None)


def test_a_length_is_set_wherever_it_stands():
    long = overridden(EXPERIMENT, {"eval.policies": "random", "seed": 3}, frames=12)
    assert long.data.sampling.num_frames == long.data.needle.num_frames == 12
    assert long.eval.full_frames == 12 and long.seed == 3
    assert long.eval.policies == ("random",)
    suite = overridden(EXPERIMENT, {"data.source": "suite"}, frames=12)
    assert suite.data.suite.num_frames == 12  # of the source that is asked, not of the run's
    a_second = overridden(EXPERIMENT, {"data.sampling.mode": "fps"}, frames=12)
    assert a_second.data.sampling.max_frames == 12
    assert overridden(EXPERIMENT, {}) == EXPERIMENT
    for name, value, said in (
        ("data.needle.frames", 3, "field data.needle.frames is unknown"),
        ("data.needle.num_frames.x", 3, "is unknown"),
        (
            "model.memory",
            {"decay": 0.5},
            "field model.memory is a table; set one of",
        ),
        ("data.needle.num_frames", "many", "data.needle.num_frames must be int, not 'many'"),
    ):
        with pytest.raises(UserError, match=said):
            overridden(EXPERIMENT, {name: value})
