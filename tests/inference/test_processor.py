"""Texts to ids and back."""

import subprocess
import sys

import numpy as np
import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.inference.processor import LLM_DIR, QFORMER_DIR, Processor, train_tokenizers
from tests.small import ROOT, small_model

TEXTS = [
    "which digit was on the red ground?",
    "which digit was on the blue ground?",
    "Qui est là, déjà?",
    "seven",
    "ex-boyfriend ex-girlfriend",
    "3",
]
CONFIG = small_model()


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return train_tokenizers(TEXTS, CONFIG, tmp_path_factory.mktemp("tokenizers"))


def test_a_question_has_both_tokenizers_forms(processor):
    question = processor.questions(["which digit was on the red ground?", ""])
    assert question.qformer_ids.shape == question.llm_ids.shape == (2, CONFIG.max_text_len)
    for ids in (question.qformer_ids, question.llm_ids):
        assert ids.dtype == np.int32
    length = question.qformer_mask[0].sum()
    assert question.qformer_mask[0, :length].all()  # padded on the right
    assert question.qformer_ids[0, 0] == 2 and question.qformer_ids[0, length - 1] == 3
    assert question.qformer_ids[1, :2].tolist() == [2, 3]  # [CLS] [SEP] of an empty question
    length = question.llm_mask[0].sum()
    assert question.llm_mask[0, -length:].all() and not question.llm_mask[0, :-length].any()
    assert question.llm_ids[0, -length] == processor.eos_id  # </s> opens it, as in LAVIS
    assert question.llm_mask[1].sum() == 1 and question.llm_ids[1, -1] == processor.eos_id
    assert (question.llm_ids[~question.llm_mask] == processor.pad_id).all()
    assert question.qformer_ids.max() < CONFIG.qformer.vocab_size
    assert question.llm_ids.max() < CONFIG.llm.vocab_size


def test_questions_are_padded_to_what_the_longest_needs(processor):
    # Each word is a token for both; [CLS] and [SEP], or </s>, are added.
    of = {count: processor.width(["seven " * count]) for count in (1, 14, 15, 20)}
    assert of == {1: 16, 14: 16, 15: 24, 20: 24}  # 32 would be beyond the limit
    assert processor.width(["", "seven " * 15, "3"]) == 24 and processor.width([]) == 16
    with pytest.raises(UserError, match="the limit is 24"):
        processor.width(["why " * 40])
    narrow, wide = processor.questions(TEXTS[:2], 16), processor.questions(TEXTS[:2])
    assert narrow.qformer_ids.shape == narrow.llm_mask.shape == (2, 16)
    np.testing.assert_array_equal(narrow.qformer_ids, wide.qformer_ids[:, :16])
    np.testing.assert_array_equal(narrow.llm_ids, wide.llm_ids[:, -16:])
    assert wide.qformer_mask.sum() == narrow.qformer_mask.sum()
    assert wide.llm_mask.sum() == narrow.llm_mask.sum()


def test_training_rows_are_prompt_answer_and_end(processor):
    questions, answers = [TEXTS[0], "seven", ""], ["3", "seven", ""]
    question, targets = processor.training(questions, answers)
    assert (
        question.llm_ids.shape == targets.shape == (3, CONFIG.max_text_len + CONFIG.max_answer_len)
    )
    alone = processor.questions(questions)
    for row, answer in enumerate(answers):
        prompt = alone.llm_ids[row][alone.llm_mask[row]]
        ids = question.llm_ids[row][question.llm_mask[row]]
        assert ids[: len(prompt)].tolist() == prompt.tolist()
        target = question.llm_ids[row][targets[row]]
        assert ids[len(prompt) :].tolist() == target.tolist()
        assert target[-1] == processor.eos_id and processor.decode(target) == answer
    assert not (targets & ~question.llm_mask).any()


def test_a_long_answer_is_cut_and_still_ends(processor):
    question, targets = processor.training(["3"], ["seven " * 30])
    target = question.llm_ids[0][targets[0]]
    assert len(target) == CONFIG.max_answer_len and target[-1] == processor.eos_id


@pytest.mark.parametrize("text", [*TEXTS, "日本語 ✓ 🙂", 'a "quoted" {brace}', "unseen words"])
def test_answers_come_back_as_they_were(processor, text):
    ids = processor._llm.encode(text, special=False)
    assert processor.decode(np.array([*ids, processor.eos_id, 5, 6])) == text
    assert processor.decode(np.array(ids)) == text


def test_a_question_too_long_is_named_with_the_limit(processor):
    with pytest.raises(UserError, match=r"'why why why.*…' has \d+ tokens; the limit is 24"):
        processor.questions(["why " * 40])
    with pytest.raises(UserError, match="shorten it"):
        processor.training(["why " * 40], ["3"])


def test_tokenizers_survive_the_disk(processor, tmp_path):
    processor.save(tmp_path)
    processor.save(tmp_path)  # in place of those that are there
    assert {path.name for path in tmp_path.iterdir()} == {QFORMER_DIR, LLM_DIR}
    again = Processor.load(tmp_path, CONFIG)
    for one, other in zip(
        processor.training(TEXTS, TEXTS), again.training(TEXTS, TEXTS), strict=True
    ):
        for a, b in zip(
            [one] if isinstance(one, np.ndarray) else vars(one).values(),
            [other] if isinstance(other, np.ndarray) else vars(other).values(),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


def test_every_process_learns_the_same_tokenizers(processor, tmp_path):
    program = (
        "import sys; from adacm2_jax.inference.processor import train_tokenizers\n"
        "from tests.inference.test_processor import CONFIG, TEXTS\n"
        "train_tokenizers(reversed(TEXTS), CONFIG, sys.argv[1])"
    )
    processor.save(tmp_path / "here")
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "there")], cwd=ROOT, check=True, timeout=120
    )
    for name in (QFORMER_DIR, LLM_DIR):
        here, there = (tmp_path / side / name / "tokenizer.json" for side in ("here", "there"))
        assert here.read_text() == there.read_text()


def test_known_words_are_whole_and_unknown_ones_spelt(processor):
    def tokens(text: str) -> list[str]:
        tokenizer = processor._qformer
        return [tokenizer.backend.id_to_token(number) for number in tokenizer.encode(text)]

    assert tokens("Which DIGIT") == ["[CLS]", "which", "digit", "[SEP]"]
    assert tokens("zebra") == ["[CLS]", "z", "##e", "##b", "##r", "##a", "[SEP]"]


def test_a_vocabulary_never_exceeds_the_model_s(tmp_path):
    texts = [f"word{n} {chr(0x4E00 + n)}" for n in range(3000)]
    learned = train_tokenizers(texts, CONFIG, tmp_path)
    assert len(learned._qformer) <= CONFIG.qformer.vocab_size
    assert len(learned._llm) <= CONFIG.llm.vocab_size


def test_a_tokenizer_larger_than_the_model_is_refused(processor, tmp_path):
    processor.save(tmp_path)
    import dataclasses

    small = dataclasses.replace(CONFIG, llm=dataclasses.replace(CONFIG.llm, vocab_size=260))
    with pytest.raises(UserError, match=r"language-model tokenizer has .* but the model has 260"):
        Processor.load(tmp_path, small)


def test_a_directory_without_tokenizers_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer at .*qformer_tokenizer"):
        Processor.load(tmp_path, CONFIG)


def test_reading_a_run_s_tokenizers_imports_neither_transformers_nor_jax(processor, tmp_path):
    processor.save(tmp_path)
    program = (
        "import sys; from adacm2_jax.config import AdaCM2Config\n"
        "from adacm2_jax.inference.processor import Processor\n"
        "found = Processor.load(sys.argv[1], AdaCM2Config())._encode('which digit?')\n"
        "assert not {'transformers', 'jax', 'torch'} & set(sys.modules)\n"
        "print(found[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == "" and done.stdout == f"{processor._encode('which digit?')[1]}\n"


@pytest.mark.parametrize("text", ["what \ud83d", "o\udcf9"])
def test_half_a_surrogate_pair_is_named(processor, text):
    with pytest.raises(UserError, match=r"is no text at character \d"):
        processor.questions([text])
