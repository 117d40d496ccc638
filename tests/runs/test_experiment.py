"""A configuration becomes an experiment once, is checked there, and comes back as it was."""

import dataclasses
import json

import pytest

from adacm2_jax.config import MemoryConfig
from adacm2_jax.errors import UserError
from adacm2_jax.runs.experiment import (
    MAY_CHANGE,
    Experiment,
    TrainConfig,
    check_same,
    difference,
    read,
    to_dict,
)
from tests.small import get_config, small_experiment, small_model


def test_what_is_stored_is_what_is_read():
    experiment = small_experiment(data__sampling__max_frames=0, mesh=(2, 1))
    assert experiment.data.sampling.max_frames is None
    assert read(json.loads(json.dumps(to_dict(experiment)))) == experiment
    assert to_dict(experiment) == json.loads(get_config().to_json()) | {"mesh": [2, 1]}


def test_a_run_of_an_older_version_has_the_defaults_of_what_it_lacks():
    stored = to_dict(Experiment(small_model()))
    del stored["train"]["accumulate"], stored["data"]["features"], stored["tokenizers"]
    assert read(stored) == Experiment(small_model())


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        ("train", "stepps", 3, ["train.stepps", "unknown", "batch_size"]),
        ("train", "steps", "3", ["train.steps", "int", "'3'"]),
        ("model", "qformer", {"num_queries": 0}, ["qformer.num_queries = 0", "at least 1"]),
        ("train", "steps", 0, ["train.steps = 0", "at least 1"]),
        ("train", "gradient", "half", ["train.gradient", "half", "two_phase"]),
        ("eval", "policies", [], ["eval.policies is empty"]),
        ("data", "prompt", "{q}", ["data.prompt", "{question}"]),
        ("data", "sampling", {"mode": "some"}, ["sampling.mode", "some"]),
        ("checkpoint", "keep", 0, ["checkpoint.keep = 0"]),
    ],
)
def test_what_cannot_be_is_named(section, field, value, words):
    stored = to_dict(Experiment(small_model()))
    stored[section][field] = value
    with pytest.raises(UserError) as error:
        read(stored)
    for word in words:
        assert word in str(error.value)


def test_the_memory_that_holds_all_must_know_the_longest_video():
    policies = ("adacm2", "full")
    experiment = small_experiment(eval__policies=policies)
    assert experiment.memories()["full"].max_frames == 4  # of data.sampling
    assert experiment.memories(frames=9)["full"].max_frames == 9  # of the one video
    unknown = small_experiment(eval__policies=policies, data__sampling__mode="fps")
    with pytest.raises(UserError, match=r"eval.policies has 'full'.*'fps'.*eval.full_frames"):
        unknown.memories()
    with pytest.raises(UserError, match=r"eval.full_frames"):
        unknown.check_training()


def test_a_run_may_become_longer_but_not_another_one():
    before = to_dict(small_experiment())
    longer = small_experiment(train__steps=99, checkpoint__every=7, data__workers=2)
    check_same(before, to_dict(longer), "runs/x", MAY_CHANGE["resume"])
    other = dataclasses.replace(longer, train=TrainConfig(steps=99, num_frames=5), seed=3)
    with pytest.raises(UserError, match=r"runs/x holds a run of another") as error:
        check_same(before, to_dict(other), "runs/x", MAY_CHANGE["resume"])
    assert " - seed = 0\n + seed = 3\n - train.num_frames = 4\n + train.num_frames = 5" in str(
        error.value
    )


def test_differences_are_told_field_by_field():
    assert difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 3}}) == [
        " - a.c = 2",
        " + a.d = 3",
    ]
    assert difference({"a": {"b": 1}}, {"a": {"b": 2}}, ("a.",)) == []


def test_ratios_of_each_layer_are_kept_exactly():
    memory = MemoryConfig(recent_ratio=("0.29",), conserve_ratio="1/3")
    experiment = Experiment(small_model(memory=memory))
    stored = json.loads(json.dumps(to_dict(experiment)))
    assert read(stored).model.memory == memory
