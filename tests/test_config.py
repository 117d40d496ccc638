"""Configurations: exact ratios, refusals that help, and the way to JSON and back."""

import json
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from adacm2_jax.config import (
    AdaCM2Config,
    LlamaConfig,
    MemoryConfig,
    QFormerConfig,
    VisionConfig,
    as_fraction,
    from_dict,
    instructblip_vicuna_7b,
    memory_preset,
    tiny,
    to_dict,
)
from adacm2_jax.errors import UserError


@pytest.mark.parametrize(
    ("value", "fraction"),
    [
        (0.29, Fraction(29, 100)),
        ("0.29", Fraction(29, 100)),
        (1e-5, Fraction(1, 100_000)),
        ("1/3", Fraction(1, 3)),
        (Fraction(2, 7), Fraction(2, 7)),
        (0, Fraction(0)),
        (1, Fraction(1)),
        (np.float32(0.1), Fraction(1, 10)),
        (np.float64(0.7), Fraction(7, 10)),
    ],
)
def test_ratios_are_read_exactly(value, fraction):
    assert as_fraction(value) == fraction


@given(st.integers(0, 10_000))
def test_a_decimal_float_is_the_decimal_that_it_prints(n):
    assert as_fraction(n / 10_000) == Fraction(n, 10_000)


REFUSED = {
    "not a number": (lambda: MemoryConfig(recent_ratio="a tenth"), "memory.recent_ratio 'a tenth'"),
    "no ratio": (lambda: MemoryConfig(conserve_ratio=None), "memory.conserve_ratio None 1/10"),
    "truth value": (lambda: MemoryConfig(recent_ratio=True), "memory.recent_ratio True 1/10"),
    "not finite": (lambda: MemoryConfig(recent_ratio=float("nan")), "memory.recent_ratio nan 1/10"),
    "by zero": (lambda: MemoryConfig(recent_ratio="1/0"), "memory.recent_ratio '1/0' 1/10"),
    "negative": (lambda: MemoryConfig(recent_ratio=-0.1), "memory.recent_ratio [0, 1] -0.1"),
    "above one": (lambda: MemoryConfig(conserve_ratio="1.01"), "memory.conserve_ratio [0, 1] 1.01"),
    "one layer": (
        lambda: MemoryConfig(recent_ratio=("0.1", "3/2")),
        "memory.recent_ratio [0, 1] 3/2",
    ),
    "policy": (lambda: MemoryConfig("newest"), "memory.policy 'newest' adacm2 full recent budget"),
    "rows": (
        lambda: MemoryConfig(score_rows="texts"),
        "memory.score_rows 'texts' query text query+text",
    ),
    "endless full": (lambda: MemoryConfig("full"), "memory.max_frames 0 'full' longest"),
    "no budget": (lambda: MemoryConfig("budget", capacity=-1), "memory.capacity -1 'budget'"),
    "no frames": (
        lambda: MemoryConfig("recent_frames"),
        "memory.recent_frames 0 'recent_frames' 1 or more",
    ),
    "decay": (lambda: MemoryConfig(decay=1.5), "memory.decay [0, 1] 1.5"),
    "decay of nothing": (
        lambda: MemoryConfig("random", decay=0.5),
        "memory.decay 0.5 'random' 'adacm2' decay=0.0",
    ),
    "shared choice of nothing": (
        lambda: MemoryConfig("recent", shared_choice=True),
        "memory.shared_choice True 'recent' 'budget' shared_choice=False",
    ),
    "shared choice by novelty": (
        lambda: MemoryConfig(novelty=1.0, shared_choice=True),
        "memory.shared_choice memory.novelty = 1 lower",
    ),
    "shared choice of unlike layers": (
        lambda: MemoryConfig(recent_ratio="0.1,0.2", shared_choice=True),
        "memory.shared_choice memory.recent_ratio one value",
    ),
    "preset": (lambda: memory_preset("eq7"), "memory preset 'eq7' eq8 eq6"),
    "patches": (
        lambda: VisionConfig(patch_size=15),
        "vision.patch_size 15 vision.image_size 224 divide",
    ),
    "vision heads": (lambda: VisionConfig(num_heads=15), "vision.num_heads 15 vision.width 1408"),
    "no heads": (lambda: QFormerConfig(num_heads=0), "qformer.num_heads 0 at least 1"),
    "crossing": (
        lambda: QFormerConfig(cross_attention_every=5),
        "qformer.cross_attention_every 5 qformer.depth 12",
    ),
    "dropout": (lambda: QFormerConfig(dropout=1.0), "qformer.dropout [0, 1) 1.0"),
    "grouping": (lambda: LlamaConfig(num_kv_heads=5), "llm.num_kv_heads 5 llm.num_heads 32"),
    "rotary": (lambda: LlamaConfig(width=96, num_heads=32), "llm.width llm.num_heads even 3"),
    "dtype": (lambda: tiny(dtype="int8"), "dtype 'int8' float32 bfloat16 float16"),
    "qformer dtype": (lambda: tiny(qformer_dtype="half"), "qformer_dtype 'half' float32 float16"),
    "no table": (lambda: tiny(temporal_positions=0), "temporal_positions 0 at least 1"),
    "long question": (
        lambda: tiny(max_text_len=65),
        "max_text_len 65 qformer.max_positions 64",
    ),
    "long prompt": (
        lambda: tiny(max_answer_len=101),
        "max_text_len max_answer_len 129 llm.max_positions 128 lower",
    ),
    "endless": (lambda: MemoryConfig(recent_ratio="1e999999999"), "memory.recent_ratio '1e99 1/10"),
    "tiny": (lambda: MemoryConfig(recent_ratio="1E-0999999999"), "memory.recent_ratio 1E-0 1/10"),
    "many digits": (lambda: MemoryConfig(recent_ratio="0." + "1" * 10**5), "'0.1111 1/10"),
    "no width": (lambda: VisionConfig(width=0), "vision.width 0 at least 1"),
    "negative depth": (lambda: LlamaConfig(depth=-1), "llm.depth -1 at least 1"),
    "no theta": (lambda: LlamaConfig(rope_theta=0.0), "llm.rope_theta 0.0 above 0"),
    "theta of nan": (lambda: LlamaConfig(rope_theta=float("nan")), "llm.rope_theta nan finite"),
    "epsilon": (lambda: tiny(ln_vision_eps=-1e-6), "ln_vision_eps -1e-06 above 0"),
    "dropout of nan": (lambda: QFormerConfig(dropout=float("nan")), "qformer.dropout nan finite"),
    "no text": (lambda: tiny(max_text_len=0), "max_text_len 0 at least 1"),
    "no answer": (lambda: tiny(max_answer_len=0), "max_answer_len 0 at least 1"),
    "beyond int32": (lambda: LlamaConfig(vocab_size=2**31), "llm.vocab_size at most lower"),
    "beyond float32": (lambda: LlamaConfig(rope_theta=1e300), "llm.rope_theta at most lower"),
    "negative most": (lambda: MemoryConfig(max_frames=-1), "memory.max_frames -1 at least 0"),
    "infinite in JSON": (
        lambda: from_dict({"memory": {"novelty": float("inf")}}),
        "memory.novelty inf finite",
    ),
    "whole, but endless": (lambda: from_dict({"ln_vision_eps": 10**400}), "ln_vision_eps finite"),
    "unknown": (lambda: from_dict({"memory": {"ratio": 1}}), "memory.ratio known recent_ratio"),
    "unknown above": (lambda: from_dict({"memmory": {}}), "memmory known memory"),
    "wrong type": (lambda: from_dict({"vision": {"depth": "39"}}), "vision.depth int '39'"),
    "truth for int": (lambda: from_dict({"max_text_len": True}), "max_text_len int True"),
    "no table of fields": (lambda: from_dict({"llm": 7}), "llm 7 fields"),
    "out of range": (
        lambda: from_dict({"memory": {"recent_ratio": [0.1, 2]}}),
        "memory.recent_ratio [0, 1] 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_with_field_value_and_remedy(case):
    build, words = REFUSED[case]
    with pytest.raises(UserError) as caught:
        build()
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words.split() if word not in message], message


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        instructblip_vicuna_7b(dtype="bfloat16", ln_vision_eps=1e-5, memory=memory_preset("eq6")),
        tiny(memory=MemoryConfig(recent_ratio=("0.1", 0.2), conserve_ratio=0)),
        tiny(memory=MemoryConfig("budget", capacity=40, score_rows="query+text")),
        tiny(dtype="float16", qformer_dtype="float32"),
    ],
    ids=["tiny", "full size", "per layer", "budget", "as LAVIS evaluates"],
)
def test_configurations_survive_json(config):
    text = json.dumps(to_dict(config))
    assert from_dict(json.loads(text)) == config


def test_a_fraction_survives_json_as_the_same_ratio():
    config = tiny(memory=MemoryConfig(recent_ratio=Fraction(1, 3)))
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert as_fraction(again.memory.recent_ratio) == Fraction(1, 3)


def test_a_table_may_leave_out_what_stays_as_it_is():
    assert from_dict({}) == AdaCM2Config()
    changed = from_dict({"memory": {"policy": "recent"}, "qformer": {"dropout": 0}})
    assert changed.memory.policy == "recent" and changed.qformer.dropout == 0.0
    assert changed.vision == VisionConfig()


def test_configurations_with_ratios_in_a_list_can_be_keys():
    config = tiny(memory=MemoryConfig(recent_ratio=["0.1", "0.2"]))
    assert config.memory.recent_ratio == ("0.1", "0.2")
    assert {config: 1}[tiny(memory=MemoryConfig(recent_ratio=("0.1", "0.2")))] == 1


def test_the_presets_have_the_sizes_of_the_method():
    full, small = instructblip_vicuna_7b(), tiny()
    assert full.vision.tokens_per_frame == 257 and full.qformer.num_cross_layers == 6
    assert full.llm.head_dim == 128
    assert small.vision.tokens_per_frame == 17 and small.qformer.num_cross_layers == 2
    assert memory_preset("eq8") == MemoryConfig() == full.memory
