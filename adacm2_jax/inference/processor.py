"""Questions and answers to token ids, and back.

Two tokenizers, as in LAVIS's InstructBLIP (blip2_vicuna_instruct.py): a BERT one for the Q-Former
(``[CLS] question [SEP]``) and a LLaMA one for the language model, where ``</s>`` opens and ends
every text. Lengths are static: a text that is learned is padded to the configuration's limit, a
question that is answered to a width that few programs serve (:meth:`Processor.width`). A question
beyond the limit is refused; LAVIS would cut off its beginning.
"""

import collections
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adacm2_jax.config import AdaCM2Config
from adacm2_jax.errors import UserError
from adacm2_jax.files import beside_path
from adacm2_jax.inference.tokenizers import (
    RULES,
    Tokenizer,
    read_llm_tokenizer,
    read_qformer_tokenizer,
)

if TYPE_CHECKING:
    from adacm2_jax.models.adacm2 import Question

QFORMER_DIR, LLM_DIR = "qformer_tokenizer", "llm_tokenizer"
#: The narrowest that questions are padded to.
_NARROWEST = 16


class Processor:
    """The text path of one model.

    Attributes:
      eos_id: the token that ends an answer.
      pad_id: the language model's padding token.
    """

    def __init__(
        self, qformer_tokenizer: Tokenizer, llm_tokenizer: Tokenizer, config: AdaCM2Config
    ):
        for name, tokenizer, rows in (
            ("Q-Former", qformer_tokenizer, config.qformer.vocab_size),
            ("language-model", llm_tokenizer, config.llm.vocab_size),
        ):
            if len(tokenizer) > rows:
                raise UserError(
                    f"the {name} tokenizer has {len(tokenizer)} tokens, but the model has {rows} "
                    "embedding rows; use the tokenizer that belongs to the checkpoint"
                )
        special = []
        for token in ("bos_token", "eos_token", "pad_token"):
            number = llm_tokenizer.token_id(token)
            if number is None:
                raise UserError(
                    f"the language-model tokenizer names no {token}; write it with train.py, or "
                    "with adacm2 port"
                )
            special.append(number)
        self._qformer, self._llm = qformer_tokenizer, llm_tokenizer
        self._max_text, self._max_answer = config.max_text_len, config.max_answer_len
        self._bos_id, self.eos_id, self.pad_id = special
        self._encode = functools.lru_cache(maxsize=4096)(self._encode_question)

    @classmethod
    def load(cls, directory: str | pathlib.Path, config: AdaCM2Config) -> "Processor":
        """Reads the two tokenizers from a directory; never goes to the network.

        Each is what :meth:`save` writes, or the files of a published checkpoint
        (``tokenizer.model``, ``vocab.txt``), which are read as LAVIS reads them.

        Raises:
          UserError: if there is none, it is damaged, or larger than the model.
        """
        root = pathlib.Path(directory)
        return cls(
            _load(root / QFORMER_DIR, read_qformer_tokenizer, config.qformer.vocab_size),
            _load(root / LLM_DIR, read_llm_tokenizer, config.llm.vocab_size),
            config,
        )

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes both tokenizers in Hugging Face's layout, in place of those that are there."""
        root = pathlib.Path(directory)
        for name, write in ((QFORMER_DIR, self.save_qformer), (LLM_DIR, self.save_llm)):
            beside = beside_path(root / name)
            write(beside)
            shutil.rmtree(root / name, ignore_errors=True)
            beside.rename(root / name)

    def save_qformer(self, directory: pathlib.Path) -> None:
        """Writes the Q-Former's tokenizer into a directory, beside what else it holds."""
        self._qformer.save(directory)

    def save_llm(self, directory: pathlib.Path) -> None:
        """Writes the language model's tokenizer into a directory, beside what else it holds.

        With its ``tokenizer.model``, if it came from one: LAVIS reads nothing else.
        """
        self._llm.save(directory)

    def width(self, questions: Iterable[str]) -> int:
        """The tokens that questions are to be padded to, the same for all of them: 16, 32, 64 … and
        ``max_text_len``.

        Padding is masked and changes no answer, but every frame is read with all of it.

        Raises:
          UserError: for a question that is longer than the limit.
        """
        longest = max((len(ids) for text in questions for ids in self._encode(text)), default=0)
        return min(max(_NARROWEST, 1 << (longest - 1).bit_length()), self._max_text)

    def questions(self, questions: Sequence[str], width: int = 0) -> "Question":
        """Prompts to generate from: the language model's side is padded on the left.

        Args:
          questions: one a row.
          width: S, what they are padded to; by default ``max_text_len``.

        Returns:
          A ``Question`` of numpy arrays, each [B, S].

        Raises:
          UserError: for a question that is longer than the limit.
        """
        from adacm2_jax.models.adacm2 import Question

        encoded = [self._encode(question) for question in questions]
        qformer, llm = zip(*encoded, strict=True)
        width = width or self._max_text
        qformer_ids, qformer_mask = _pad(qformer, width, 0)
        llm_ids, llm_mask = _pad(llm, width, self.pad_id, left=True)
        return Question(qformer_ids, qformer_mask, llm_ids, llm_mask)

    def training(
        self, questions: Sequence[str], answers: Sequence[str]
    ) -> tuple["Question", np.ndarray]:
        """Teacher-forcing rows: prompt, answer and ``</s>``, padded on the right.

        Returns:
          A ``Question`` whose ``llm_*`` are [B, max_text_len + max_answer_len], and bool of the
          same shape: true on the answer's tokens.
        """
        from adacm2_jax.models.adacm2 import Question

        encoded = [self._encode(question) for question in questions]
        qformer, prompts = zip(*encoded, strict=True)
        endings = [self._answer(answer) for answer in answers]
        rows = [prompt + ending for prompt, ending in zip(prompts, endings, strict=True)]
        length = self._max_text + self._max_answer
        qformer_ids, qformer_mask = _pad(qformer, self._max_text, 0)
        llm_ids, llm_mask = _pad(rows, length, self.pad_id)
        place = np.arange(length)
        starts = np.array([len(prompt) for prompt in prompts])[:, None]
        targets = llm_mask & (place >= starts)
        return Question(qformer_ids, qformer_mask, llm_ids, llm_mask), targets

    def candidates(
        self, questions: Sequence[str], answers: Sequence[str]
    ) -> tuple["Question", np.ndarray]:
        """:meth:`training` for answers that count whole.

        Raises:
          UserError: for an answer that is longer than the limit.
        """
        for answer in answers:
            count = len(self._llm.encode(answer, special=False)) + 1
            if count > self._max_answer:
                raise UserError(
                    f"the candidate {_short(answer)!r} has {count} tokens with its end; the limit "
                    f"is {self._max_answer} (max_answer_len): shorten it"
                )
        return self.training(questions, answers)

    def decode(self, ids: np.ndarray) -> str:
        """Generated ids, int[S], up to the first end token, as text."""
        tokens = ids.tolist()
        if self.eos_id in tokens:
            tokens = tokens[: tokens.index(self.eos_id)]
        return self._llm.decode(tokens).strip()

    def _encode_question(self, question: str) -> tuple[list[int], list[int]]:
        qformer = self._qformer.encode(question)
        # LAVIS opens every prompt with the tokenizer's bos, which it has set to </s>.
        llm = [self._bos_id, *self._llm.encode(question, special=False)]
        longest = max(len(qformer), len(llm))
        if longest > self._max_text:
            raise UserError(
                f"the question {_short(question)!r} has {longest} tokens; the limit is "
                f"{self._max_text} (max_text_len): shorten it"
            )
        return qformer, llm

    def _answer(self, answer: str) -> list[int]:
        ids = self._llm.encode(answer, special=False)
        # LAVIS cuts on the right too, but with the end token; ours always ends.
        return [*ids[: self._max_answer - 1], self.eos_id]


def _load(
    path: pathlib.Path, read: Callable[[pathlib.Path, int], Tokenizer], rows: int
) -> Tokenizer:
    """The tokenizer in a directory; ``read`` takes those that have no ``tokenizer.json``."""
    if not path.is_dir():
        raise UserError(
            f"no tokenizer at {path}; point to a directory that holds {QFORMER_DIR}/ and "
            f"{LLM_DIR}/, as train.py writes them"
        )
    return Tokenizer.load(path) if (path / RULES).is_file() else read(path, rows)


def train_tokenizers(
    texts: Iterable[str], config: AdaCM2Config, directory: str | pathlib.Path | None = None
) -> Processor:
    """Learns both tokenizers from a corpus, for a model that starts from nothing, and saves them
    if a directory is given.

    A lower-casing WordPiece tokenizer of BERT's form and a byte-level BPE tokenizer with LAVIS's
    special tokens; neither is larger than the model's embedding tables. The same texts give the
    same tokenizers, in every process.
    """
    import tokenizers as tk

    texts = sorted(set(texts))
    normalizer = tk.normalizers.BertNormalizer(lowercase=True)
    splitter = tk.pre_tokenizers.BertPreTokenizer()
    words = collections.Counter(
        word
        for text in texts
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    vocabulary = _word_pieces(words, config.qformer.vocab_size)
    bert = tk.Tokenizer(tk.models.WordPiece(vocabulary, unk_token="[UNK]"))
    bert.normalizer, bert.pre_tokenizer = normalizer, splitter
    bert.post_processor = tk.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    llama = tk.Tokenizer(tk.models.BPE(unk_token="</s>"))
    llama.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=True)
    llama.decoder = tk.decoders.ByteLevel()
    llama.train_from_iterator(
        texts,
        tk.trainers.BpeTrainer(
            vocab_size=config.llm.vocab_size,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    processor = Processor(
        Tokenizer(
            bert,
            dict(
                pad_token="[PAD]",
                unk_token="[UNK]",
                cls_token="[CLS]",
                sep_token="[SEP]",
                bos_token="[DEC]",
            ),
        ),
        Tokenizer(
            llama,
            dict(pad_token="<pad>", bos_token="</s>", eos_token="</s>", unk_token="</s>"),
        ),
        config,
    )
    if directory is not None:
        processor.save(directory)
    return processor


def _word_pieces(words: collections.Counter, size: int) -> dict[str, int]:
    """BERT's special tokens, the letters, and the most frequent words that there is room for.

    The library's own trainer numbers its pieces by a hash that differs from process to process.
    """
    letters = collections.Counter("abcdefghijklmnopqrstuvwxyz0123456789")
    for word, count in words.items():
        letters.update(dict.fromkeys(word, count))
    by_frequency = sorted(letters, key=lambda letter: (-letters[letter], letter))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]"]
    # A writing of thousands of letters leaves half of the room to words.
    for letter in by_frequency[: max(36, size // 4)]:
        pieces += [letter, f"##{letter}"]
    pieces += sorted(words, key=lambda word: (-words[word], word))
    return {piece: i for i, piece in enumerate(list(dict.fromkeys(pieces))[:size])}


def _pad(rows: Sequence[list[int]], length: int, value: int, left: bool = False) -> tuple[Any, Any]:
    ids = np.full((len(rows), length), value, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(len(row))
        ids[i, place], mask[i, place] = row, True
    return ids, mask


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "…"
