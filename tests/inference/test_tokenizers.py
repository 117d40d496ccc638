"""LAVIS's tokenizers from real files: BERT's vocabulary and a LLaMA-style sentencepiece model."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import sentencepiece
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st

from adacm2_jax.config import AdaCM2Config, LlamaConfig
from adacm2_jax.errors import UserError
from adacm2_jax.inference.processor import LLM_DIR, QFORMER_DIR, Processor
from adacm2_jax.inference.tokenizers import (
    Tokenizer,
    check_vicuna,
    read_llm_tokenizer,
    read_qformer_tokenizer,
    read_tokenizers,
)
from tests.vocabularies import PIECES, WORDS

REFERENCE = sentencepiece.SentencePieceProcessor(model_file=str(PIECES))

SENTENCES = (
    "What is unusual about this image?",
    "Question: which digit was on the red ground? Short answer:",
    "Überraschung: 100,000 naïve 日本語 🙂!",
    "ex-boyfriend's\tdéjà-vu\n(tab, newline)",
)
#: text → ids, as LAVIS's slow LlamaTokenizer gives them for this model (transformers 4.57.6,
#: ``LlamaTokenizer.from_pretrained(use_fast=False)``, then LAVIS's ``add_special_tokens``).
LLM_GOLDEN = {
    "": [2],
    "What is unusual about this image?": [2, 1824, 349, 14614, 684, 456, 3469, 28804],
    "Question: what? Short answer:": [2, 22478, 28747, 767, 28804, 11530, 4372, 28747],
    "  two  spaces ": [2, 259, 989, 28705, 10599, 28705],
    "naïve 日本語 🙂\n\tx": [
        *(2, 1879, 28920, 333, 28705, 29142, 29119, 30321, 28705, 29340, 13, 12, 28744)
    ],
    "a</s> b[PAD]<s>c": [2, 264, 2, 28705, 287, 32000, 1, 277],
    "a </s> b ": [2, 264, 28705, 2, 28705, 287, 28705],
    "<image>": [2, 523, 4075, 28767],
}
BERT_GOLDEN = {
    "": [101, 102],
    "What is unusual about this image?": [101, 2054, 2003, 5866, 2055, 2023, 3746, 1029, 102],
    "Déjà-vu, naïve [DEC] 日本": [
        *(101, 2139, 3900, 1011, 24728, 1010, 15743, 30522, 1864, 1876, 102)
    ],
}
TEXTS = st.text() | st.text("ab .,?é日🙂▁\n\t", max_size=40)


def write(path: pathlib.Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory) -> pathlib.Path:
    """As published: slow files alone, and special tokens that are not LAVIS's."""
    directory = tmp_path_factory.mktemp("vicuna")
    shutil.copyfile(PIECES, directory / "tokenizer.model")
    write(directory / "config.json", {"model_type": "llama"})
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "legacy": False}
    write(directory / "tokenizer_config.json", settings | {"model_max_length": 2048})
    return directory


@pytest.fixture(scope="module")
def tokenizers(vicuna):
    return read_tokenizers(vicuna, WORDS, 32001, 30523)


@pytest.fixture(scope="module")
def instructblip(tokenizers, tmp_path_factory) -> pathlib.Path:
    """Fast files alone: ``<image>``, ``<s>`` in front, newer rules, merges written as of old."""
    directory = tmp_path_factory.mktemp("instructblip")
    qformer, llm = tokenizers
    qformer.save(directory / "qformer_tokenizer")
    llm.save(directory)
    file = directory / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["added_tokens"].append(stored["added_tokens"][-1] | {"id": 32001, "content": "<image>"})
    stored["model"]["merges"] = [" ".join(merge) for merge in stored["model"]["merges"]]
    stored["normalizer"] = None
    scheme = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    stored["pre_tokenizer"] = scheme
    file.write_text(json.dumps(stored).replace('"</s>": {"id"', '"<s>": {"id"'))
    write(directory / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "<s>"})
    write(directory / "special_tokens_map.json", {"pad_token": "<unk>"})
    return directory


def config(rows: int = 32001, **fields) -> AdaCM2Config:
    return AdaCM2Config(llm=LlamaConfig(vocab_size=rows), **fields)


# --- the language model's side --------------------------------------------------------------------


@pytest.mark.parametrize("text", LLM_GOLDEN)
def test_the_llm_s_ids_are_those_of_lavis(tokenizers, text):
    assert tokenizers[1].encode(text) == LLM_GOLDEN[text]


@given(TEXTS)
def test_every_text_has_sentencepiece_s_ids(tokenizers, text):
    """What the slow tokenizer calls for a text without special tokens."""
    assume(not any(token in text for token in ("<unk>", "<s>", "</s>", "[PAD]")))
    ids = tokenizers[1].encode(text, special=False)
    assert ids == REFERENCE.encode(text)


def test_the_llm_s_ids_are_those_of_transformers(tokenizers, vicuna):
    """Of version 4 and 5, whose own tokenizer differs where spaces are repeated."""
    theirs = transformers.LlamaTokenizer.from_pretrained(vicuna, legacy=True, local_files_only=True)
    for text in SENTENCES:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizers[1].encode(text) == [2, *ids]


def test_bos_eos_and_unk_are_the_end_token(tokenizers):
    _, llm = tokenizers
    assert [llm.token_id(f"{name}_token") for name in ("bos", "eos", "unk", "pad")] == [
        2,
        2,
        2,
        32000,
    ]
    assert (llm.token("bos_token"), llm.token("pad_token")) == ("</s>", "[PAD]")
    assert len(llm) == 32001 and llm.settings["truncation_side"] == "left"


@pytest.mark.parametrize(("rows", "pad", "size"), [(32000, 0, 32000), (32001, 32000, 32001)])
def test_padding_has_a_row_in_every_table(vicuna, rows, pad, size):
    llm = read_llm_tokenizer(vicuna, rows)
    assert llm.token_id("pad_token") == pad and len(llm) == size
    assert [llm.token_id(f"{name}_token") for name in ("bos", "eos", "unk")] == [2, 2, 2]
    assert llm.encode(SENTENCES[0]) == LLM_GOLDEN[SENTENCES[0]]


@pytest.mark.parametrize("rows", [32000, 32001, 32064])
@pytest.mark.parametrize("source", ["vicuna", "instructblip"])
def test_every_source_and_table_give_the_same_ids(source, rows, request):
    directory = request.getfixturevalue(source)
    llm = read_llm_tokenizer(directory, rows)
    assert llm.token_id("pad_token") == (0 if rows == 32000 else 32000) < rows
    assert len(llm) <= 32001  # <image> is not a token of ours
    for text, ids in LLM_GOLDEN.items():
        if "[PAD]" not in text:
            assert llm.encode(text) == ids
    processor = Processor(read_qformer_tokenizer(WORDS, 30523), llm, config(rows))
    question = processor.questions(["<image> [PAD]"])
    assert 0 <= question.llm_ids.min() and question.llm_ids.max() < rows


@pytest.mark.parametrize("text", [*SENTENCES, "seven", " ", "two  spaces", "<image>"])
def test_answers_come_back_as_they_were(tokenizers, text):
    processor = Processor(*tokenizers, config())
    ids = processor._answer(text)
    assert ids[-1] == 2 and processor.decode(np.array([*ids, 9, 9])) == text.strip()
    # Ids below 2 are not written, as in MA-LMM.
    assert processor.decode(np.array([0, 1, *ids])) == text.strip()


# --- the Q-Former's side --------------------------------------------------------------------------


@pytest.mark.parametrize("text", BERT_GOLDEN)
def test_the_qformer_s_ids_are_bert_s(tokenizers, text):
    assert tokenizers[0].encode(text) == BERT_GOLDEN[text]


def test_the_qformer_s_ids_are_those_of_transformers(tokenizers):
    theirs = transformers.BertTokenizer.from_pretrained(WORDS.parent, local_files_only=True)
    for text in [*SENTENCES, "a [MASK] b", "x" * 101, "\x00control\u200b"]:
        assert tokenizers[0].encode(text) == theirs(text)["input_ids"]


def test_dec_is_the_word_after_the_last(tokenizers):
    qformer, _ = tokenizers
    assert len(qformer) == 30523 and qformer.settings["truncation_side"] == "left"
    ids = [qformer.token_id(f"{name}_token") for name in ("bos", "pad", "cls", "sep")]
    assert qformer.token("bos_token") == "[DEC]" and ids == [30522, 0, 101, 102]
    assert 30522 not in qformer.encode(SENTENCES[0])  # never put in by itself


def test_bert_is_read_from_a_file_a_directory_and_fast_files(tokenizers, instructblip):
    for source in (WORDS, WORDS.parent, instructblip / "qformer_tokenizer"):
        found = read_qformer_tokenizer(source, 30523)
        assert found.backend.get_vocab() == tokenizers[0].backend.get_vocab()
        for text, ids in BERT_GOLDEN.items():
            assert found.encode(text) == ids


# --- prompts --------------------------------------------------------------------------------------


def test_a_prompt_is_lavis_s_row(tokenizers):
    """InstructBLIP's documented example: ``</s>`` opens it, padding is on its left."""
    question = Processor(*tokenizers, config()).questions([SENTENCES[0], ""])
    ids = LLM_GOLDEN[SENTENCES[0]]
    assert question.llm_ids[0].tolist() == [32000] * (128 - len(ids)) + ids
    assert question.llm_mask.sum(1).tolist() == [len(ids), 1]
    assert question.llm_ids[1, -1] == 2  # an empty prompt is </s> alone
    ids = BERT_GOLDEN[SENTENCES[0]]
    assert question.qformer_ids[0].tolist() == ids + [0] * (128 - len(ids))


def test_a_training_row_is_prompt_answer_end_and_padding(tokenizers):
    processor = Processor(*tokenizers, config(max_answer_len=16))
    question, targets = processor.training([SENTENCES[0]], ["the man irons"])
    answer = [*REFERENCE.encode("the man irons"), 2]  # without the bos that opens it in LAVIS
    row = LLM_GOLDEN[SENTENCES[0]] + answer
    assert question.llm_ids[0].tolist() == row + [32000] * (144 - len(row))
    assert question.llm_mask[0].tolist() == [True] * len(row) + [False] * (144 - len(row))
    assert question.llm_ids[0][targets[0]].tolist() == answer


def test_a_prompt_that_is_too_long_is_refused(tokenizers):
    with pytest.raises(UserError, match=r"has 202 tokens; the limit is 128 \(max_text_len\)"):
        Processor(*tokenizers, config()).questions(["why " * 200])


# --- on disk --------------------------------------------------------------------------------------


def test_a_checkpoint_carries_its_tokenizers(tokenizers, tmp_path):
    processor = Processor(*tokenizers, config())
    processor.save(tmp_path)
    again = Processor.load(tmp_path, config())
    again.save(tmp_path)  # in place of the files that it was read from
    again = Processor.load(tmp_path, config())
    texts = [*LLM_GOLDEN, *SENTENCES]
    for one, other in zip(
        vars(processor.questions(texts)).values(),
        vars(again.questions(texts)).values(),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    assert (again.eos_id, again.pad_id) == (2, 32000)
    assert {path.name for path in tmp_path.iterdir()} == {QFORMER_DIR, LLM_DIR}
    # LAVIS itself reads this file alone.
    assert (tmp_path / LLM_DIR / "tokenizer.model").read_bytes() == PIECES.read_bytes()


@pytest.mark.parametrize("name", [QFORMER_DIR, LLM_DIR])
def test_saved_tokenizers_are_hugging_face_s(tokenizers, tmp_path, name):
    Processor(*tokenizers, config()).save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name, local_files_only=True)
    golden = BERT_GOLDEN if name == QFORMER_DIR else LLM_GOLDEN
    for text, ids in golden.items():
        assert theirs(text)["input_ids"] == ids


@pytest.mark.parametrize("name", [QFORMER_DIR, LLM_DIR])
def test_a_run_s_tokenizers_are_transformers_s_for_every_text(tokenizers, tmp_path, name):
    """Ids of any text and the text of any ids, those that no text has included."""
    Processor(*tokenizers, config()).save(tmp_path)
    ours = Tokenizer.load(tmp_path / name)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / name)
    assert len(ours) == len(theirs)
    for role in ("bos", "eos", "pad", "unk", "cls", "sep"):
        assert ours.token_id(f"{role}_token") == getattr(theirs, f"{role}_token_id")

    @given(TEXTS, st.lists(st.integers(0, len(theirs) - 1), max_size=20))
    def same(text, ids):
        assert ours.encode(text) == theirs(text)["input_ids"]
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, special=False) == plain
        for written in (plain, ids):
            assert ours.decode(written) == theirs.decode(written, skip_special_tokens=True)

    same()


#: Changes to a stored tokenizer, as other programs and versions write it.
VARIANTS = {
    "of transformers 4": (
        {"add_bos_token": True, "model_max_length": 1e30},
        {"bos_token": {"content": "<s>", "lstrip": True}, "pad_token": "</s>"},
    ),
    "with tokens of its own": (
        {
            "pad_token": "<pad>",
            "cls_token": "<go>",
            "additional_special_tokens": [
                "<video>",
                {
                    "__type": "AddedToken",
                    "content": "<image>",
                    "special": True,
                    "normalized": False,
                },
            ],
        },
        None,
    ),
    "with a table of added tokens": (
        {"added_tokens_decoder": {"32001": {"content": "<video>", "special": True}}},
        {"pad_token": "<unk>"},
    ),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_tokenizers_of_other_programs_are_read_as_transformers_reads_them(
    tokenizers, tmp_path, case
):
    tokenizers[1].save(tmp_path)
    settings, old = VARIANTS[case]
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write(tmp_path / "tokenizer_config.json", stored | settings)
    if old:
        write(tmp_path / "special_tokens_map.json", old)
    ours = Tokenizer.load(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(ours) == len(theirs)
    for role in ("bos", "eos", "pad", "unk"):
        assert ours.token_id(f"{role}_token") == getattr(theirs, f"{role}_token_id")
    for text in [*SENTENCES, "<video> a<image>b <s>c<pad> d<go> ", "a</s> b[PAD]"]:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    # Written and read again, it is the same.
    ours.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").encode("<video> a") == ours.encode("<video> a")


def test_slow_files_are_read_as_lavis_reads_them(tokenizers, vicuna, tmp_path):
    shutil.copytree(vicuna, tmp_path / LLM_DIR)
    (tmp_path / QFORMER_DIR).mkdir()
    shutil.copyfile(WORDS, tmp_path / QFORMER_DIR / "vocab.txt")
    question = Processor.load(tmp_path, config()).questions(list(SENTENCES))
    expected = Processor(*tokenizers, config()).questions(list(SENTENCES))
    np.testing.assert_array_equal(question.llm_ids, expected.llm_ids)
    np.testing.assert_array_equal(question.qformer_ids, expected.qformer_ids)


def test_tokenizers_of_either_side_go_into_any_directory(tokenizers, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    processor = Processor(*tokenizers, config())
    processor.save_llm(tmp_path)
    processor.save_qformer(tmp_path / "qformer_tokenizer")
    assert (tmp_path / "config.json").read_text() == "{}"
    again = read_tokenizers(tmp_path, tmp_path / "qformer_tokenizer", 32001, 30523)
    assert again[1].encode(SENTENCES[1]) == tokenizers[1].encode(SENTENCES[1])


# --- what cannot be used --------------------------------------------------------------------------


def test_unusable_files_are_named_with_a_remedy(vicuna, instructblip, tmp_path):
    empty, junk, mixed = tmp_path / "empty", tmp_path / "junk", tmp_path / "mixed"
    for directory in (empty, junk, mixed):
        directory.mkdir()
    (junk / "tokenizer.model").write_bytes(os.urandom(2000))
    (junk / "vocab.txt").write_bytes(b"\xff\xfe" * 50)
    shutil.copyfile(instructblip / "qformer_tokenizer/tokenizer.json", mixed / "tokenizer.json")
    short = tmp_path / "short.txt"
    short.write_text("".join(WORDS.read_text().splitlines(keepends=True)[:29000]))
    plain = tmp_path / "plain.txt"
    plain.write_text("a\nb\n")
    cut = tmp_path / "cut"
    write(cut / "tokenizer.json", {"version": "1.0"})
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text('{"model": {"ty')
    for source, rows, message in (
        (empty, 32001, f"{empty}: no tokenizer.model or tokenizer.json here; copy"),
        (junk, 32001, f"{junk}/tokenizer.model is no sentencepiece model"),
        (mixed, 32001, f"{mixed}/tokenizer.json holds a WordPiece tokenizer, not BPE"),
        (cut, 32001, f"{cut}/tokenizer.json is damaged: it holds no vocabulary"),
        (broken, 32001, f"{broken}/tokenizer.json is damaged ("),
        (vicuna, 31999, "has 32000 pieces, but the language model has 31999 embedding rows"),
        (vicuna, 50000, "has 32000 pieces, but the language model has 50000 embedding rows"),
    ):
        with pytest.raises(UserError) as error:
            read_llm_tokenizer(source, rows)
        assert message in str(error.value) and "\n" not in str(error.value)
    for source, rows, message in (
        (empty, 30523, f"{empty}: no vocab.txt or tokenizer.json of the Q-Former here"),
        (tmp_path / "gone.txt", 30523, "gone.txt: no vocab.txt or tokenizer.json"),
        (junk, 30523, f"{junk}/vocab.txt is no text in UTF-8"),
        (plain, 30523, f"{plain} is no BERT vocabulary: it has no [PAD]"),
        (short, 30523, "has 29000 words, with [DEC] 29001, but the Q-Former has 30523"),
        (WORDS, 30522, "has 30522 words, with [DEC] 30523, but the Q-Former has 30522"),
        (cut, 30523, f"{cut}/tokenizer.json is damaged"),
        (None, 30523, "the source holds no tokenizer for the Q-Former; pass --bert"),
    ):
        with pytest.raises(UserError) as error:
            read_tokenizers(vicuna, source, 32001, rows)
        assert message in str(error.value) and "\n" not in str(error.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1842767\n"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.txt", "config.json"])
def test_a_pointer_of_git_lfs_is_recognised(vicuna, tokenizers, tmp_path, name):
    shutil.copytree(vicuna, tmp_path / LLM_DIR)
    (tmp_path / QFORMER_DIR).mkdir()
    shutil.copyfile(WORDS, tmp_path / QFORMER_DIR / "vocab.txt")
    directory = tmp_path / (QFORMER_DIR if name == "vocab.txt" else LLM_DIR)
    (directory / name).write_text(POINTER)
    with pytest.raises(UserError) as error:
        check_vicuna(tmp_path / LLM_DIR)
        Processor.load(tmp_path, config())
    assert f"{directory / name} is a pointer of git-lfs" in str(error.value)
    assert f"run `git lfs pull` in {directory}" in str(error.value)


def test_a_sentencepiece_model_of_other_rules_is_refused(tmp_path):
    """A unigram model: the right file name, the wrong algorithm."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(SENTENCES * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="unigram",
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    rows = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model")).vocab_size()
    with pytest.raises(UserError, match=r"tokenizer.model is no LLaMA tokenizer: .* differently"):
        read_llm_tokenizer(tmp_path, rows)


def test_a_damaged_tokenizer_of_a_checkpoint_is_named(tokenizers, tmp_path):
    Processor(*tokenizers, config()).save(tmp_path)
    file = tmp_path / LLM_DIR / "tokenizer.json"
    file.write_text(file.read_text()[:5000])
    with pytest.raises(UserError, match=r"the tokenizer in .*llm_tokenizer is damaged .* restore"):
        Processor.load(tmp_path, config())


def test_a_tokenizer_without_special_tokens_is_refused(tokenizers, tmp_path):
    Processor(*tokenizers, config()).save(tmp_path)
    write(tmp_path / LLM_DIR / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    (tmp_path / LLM_DIR / "special_tokens_map.json").unlink(missing_ok=True)  # of transformers 4
    with pytest.raises(UserError, match="the language-model tokenizer names no pad_token"):
        Processor.load(tmp_path, config())
