"""Small checkpoints on disk without PyTorch, and what those with it have in common."""

import dataclasses
import json
import pathlib

import numpy as np
import safetensors.numpy
import sentencepiece

from adacm2_jax.config import AdaCM2Config, tiny
from adacm2_jax.models.params import param_shapes
from adacm2_jax.port.formats import to_hugging_face_config
from adacm2_jax.port.names import hf_table
from adacm2_jax.port.rules import pieces_of

PIECES, WORDS = 330, 120
TEXTS = [
    "which digit was on the red ground?",
    "what does the video describe?",
    "Question: who is speaking in the last scene? Short answer:",
    "a man rides a horse along the beach while the sun sets",
]


def config(**overrides) -> AdaCM2Config:
    """A model whose tables have a row for ``[PAD]`` and for ``[DEC]``, as InstructBLIP's have, and
    as many heads: LAVIS's files do not say how many."""
    base = tiny()
    sizes = dict(
        vision=dataclasses.replace(base.vision, num_heads=16),
        qformer=dataclasses.replace(base.qformer, vocab_size=WORDS + 1, dropout=0.1, num_heads=12),
        llm=dataclasses.replace(base.llm, vocab_size=PIECES + 1, num_kv_heads=4),
        max_text_len=48,
        max_answer_len=76,
    )
    return dataclasses.replace(base, **(sizes | overrides))


def write_pieces(directory: pathlib.Path) -> None:
    """A sentencepiece model of LLaMA's form."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 8),
            model_writer=file,
            vocab_size=PIECES,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            minloglevel=2,
        )


def write_words(directory: pathlib.Path) -> None:
    """A ``vocab.txt`` of BERT's form."""
    directory.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [
        mark + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789?:" for mark in ("", "##")
    ]
    words += sorted(
        {w for text in TEXTS for w in text.lower().replace("?", " ").split()} - set(words)
    )
    words += [f"[unused{i}]" for i in range(WORDS - len(words))]
    (directory / "vocab.txt").write_text("\n".join(words[:WORDS]) + "\n")


def hugging_face_tensors(c: AdaCM2Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values under Hugging Face's names."""
    rng, shapes, table = np.random.default_rng(seed), param_shapes(c), hf_table(c)
    tensors = {
        piece.name: rng.standard_normal(piece.whole_shape, np.float32)
        for rule in table.rules
        if rule.ours != "temporal_embed"
        for piece in pieces_of(rule, shapes[rule.ours])
    }
    for name, (which, parts) in table.zeros.items():
        tensors[name].reshape(parts, -1)[which] = 0
    return tensors


def write_safetensors(
    directory: pathlib.Path, c: AdaCM2Config, tensors: dict[str, np.ndarray], shards: int = 1
) -> pathlib.Path:
    """An InstructBLIP in Hugging Face's layout, with an index if it has several shards."""
    write_pieces(directory)
    write_words(directory / "qformer_tokenizer")
    settings = to_hugging_face_config(c, "float32", None)
    (directory / "config.json").write_text(settings.to_json_string())
    names = sorted(tensors)
    weight_map = {name: f"model-{i % shards + 1}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        held = {name: tensors[name] for name in names if weight_map[name] == file}
        safetensors.numpy.save_file(held, directory / file, {"format": "pt"})
    if shards > 1:
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (directory / "model.safetensors.index.json").write_text(index)
    return directory


def read_json(path: pathlib.Path) -> dict:
    return json.loads(path.read_text())
