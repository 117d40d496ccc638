"""The tokenizers of ported checkpoints, from local files, token for token as LAVIS has them.

LAVIS (``blip2_vicuna_instruct.py``) takes two tokenizers and changes their special tokens; what a
directory's own configuration says of those is not looked at, since published ones contradict it.

* Q-Former: BERT's, lower-casing, with ``[DEC]`` added as bos: 30,522 words become 30,523.
* Language model: Vicuna's sentencepiece model, with ``[PAD]`` added (32,000 pieces become 32,001)
  and **bos = eos = unk = </s>**, id 2: every text begins with 2, never with ``<s>``, id 1.

LAVIS runs the slow ``LlamaTokenizer`` of transformers 4.28 to 4.31. Later versions name its
behaviour ``legacy=True`` (their own default became ``legacy=False``): each stretch of text between
special tokens gets a space in front. Here it is written out as rules of the tokenizers library, so
that every version of transformers gives the same ids, and is stored as ``tokenizer.json``.
Transformers itself is not imported: that alone takes 1.4 s.

An embedding table has 32,000, 32,001 or 32,064 rows. In a table of 32,000, Vicuna's own, there is
no row for ``[PAD]``: padding is then ``<unk>``, id 0, which has one. Any row will do, since padding
is masked; ``</s>`` would too, but makes an end look like padding. A table of 32,064 is Hugging
Face's, filled up to a multiple of 64; its row 32001 is ``<image>``, where transformers puts the
visual tokens. Ours go in directly, so ``<image>`` in a question is mere text, as it is for LAVIS.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from adacm2_jax.errors import UserError, check_text, reason
from adacm2_jax.files import check_pointer, read_json

#: Files of a tokenizer: the rules, the special tokens, a sentencepiece model.
RULES, SETTINGS, PIECES = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LLAMA_TOKENS = ("<unk>", "<s>", "</s>")
#: Tables are filled up to a multiple of this.
ROW_MULTIPLE = 64
#: (width, layers) → the language models of InstructBLIP that come in versions.
VICUNAS = {(4096, 32): "Vicuna-7B", (5120, 40): "Vicuna-13B"}
#: What must come out of a tokenizer.model as the sentencepiece library has it.
_PROBES = ("", "  What  is\tit?\n", "Überraschung: 100,000 naïve 日本語 🙂!")


class Tokenizer:
    """A ``tokenizers.Tokenizer`` and its special tokens, in Hugging Face's layout on disk.

    Ids and texts are those of ``transformers.PreTrainedTokenizerFast``, which no published class of
    its own rules overlays: those differ from one version of transformers to the next.

    Args:
      backend: a ``tokenizers.Tokenizer``; special tokens that it lacks are added to it.
      settings: what ``tokenizer_config.json`` holds: ``bos_token``, ``eos_token`` and so on.
      pieces: the sentencepiece model that it comes from: LAVIS reads nothing else.
    """

    def __init__(self, backend: Any, settings: dict, pieces: pathlib.Path | None = None):
        self.backend, self.settings = backend, settings
        self._pieces = pieces.read_bytes() if pieces else None
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = False
        roles = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # in transformers' order
        _add_tokens(backend, [settings.get(f"{role}_token") for role in roles], {"special": True})
        for name in ("additional_special_tokens", "extra_special_tokens"):
            others = settings.get(name) or []
            _add_tokens(backend, others.values() if isinstance(others, dict) else others)

    @classmethod
    def load(cls, directory: pathlib.Path) -> "Tokenizer":
        """Reads what :meth:`save`, or transformers, wrote.

        Raises:
          UserError: if it is damaged.
        """
        import tokenizers as tk

        settings = read_json(directory / SETTINGS) if (directory / SETTINGS).is_file() else {}
        old = directory / "special_tokens_map.json"  # what counts in files of old versions
        if old.is_file() and "added_tokens_decoder" not in settings:
            settings |= read_json(old)
        check_pointer(directory / RULES)
        try:
            backend = tk.Tokenizer.from_file(str(directory / RULES))
            others = settings.get("added_tokens_decoder", {})
            _add_tokens(backend, [others[number] for number in sorted(others, key=int)])
        except Exception as error:  # the tokenizers library raises nothing more precise
            raise UserError(
                f"the tokenizer in {directory} is damaged ({reason(error)}); restore it from a copy"
            ) from error
        pieces = directory / PIECES
        return cls(backend, settings, pieces if pieces.is_file() else None)

    def save(self, directory: pathlib.Path) -> None:
        """Writes it into a directory (also an ``epath.Path``), beside what else that holds."""
        directory.mkdir(parents=True, exist_ok=True)
        # Each version of transformers names a class that others do not have; all know this one. It
        # is to take no space out of an answer either.
        settings = {"clean_up_tokenization_spaces": False, **self.settings}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (directory / RULES).write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        (directory / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        if self._pieces and not (directory / PIECES).exists():
            (directory / PIECES).write_bytes(self._pieces)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids, with the special tokens that its rules put around a text unless told not to.

        Raises:
          UserError: for half of a surrogate pair, which no text holds.
        """
        return self.backend.encode(check_text(text, "the text"), add_special_tokens=special).ids

    def decode(self, ids: list[int]) -> str:
        """Text, without special tokens."""
        return self.backend.decode(ids)

    def token(self, name: str) -> str | None:
        """The token in a role, such as ``pad_token``."""
        return _content(self.settings.get(name))

    def token_id(self, name: str) -> int | None:
        """Its number."""
        token = self.token(name)
        return None if token is None else self.backend.token_to_id(token)

    def __len__(self) -> int:
        return self.backend.get_vocab_size()


def read_tokenizers(
    llm_dir: str | pathlib.Path,
    bert_dir: str | pathlib.Path | None,
    llm_rows: int,
    bert_rows: int,
) -> tuple[Tokenizer, Tokenizer]:
    """Both tokenizers of a checkpoint, with LAVIS's special tokens.

    Args:
      llm_dir: a Hugging Face InstructBLIP, or a Vicuna.
      bert_dir: ``qformer_tokenizer/`` beside it, a bert-base-uncased, or a ``vocab.txt``.
      llm_rows: of the language model's embedding table.
      bert_rows: of the Q-Former's.

    Returns:
      The Q-Former's and the language model's.

    Raises:
      UserError: for a file that is missing, damaged, or does not fit the table.
    """
    if bert_dir is None:
        raise UserError(
            "the source holds no tokenizer for the Q-Former; pass --bert with the directory of "
            "bert-base-uncased, or with its vocab.txt"
        )
    return read_qformer_tokenizer(bert_dir, bert_rows), read_llm_tokenizer(llm_dir, llm_rows)


def read_qformer_tokenizer(path: str | pathlib.Path, rows: int) -> Tokenizer:
    """BERT's tokenizer with ``[DEC]``; arguments and errors as for :func:`read_tokenizers`."""
    import tokenizers as tk

    words, file = _words(pathlib.Path(path))
    if missing := [token for token in BERT_TOKENS if token not in words]:
        raise UserError(
            f"{file} is no BERT vocabulary: it has no {missing[0]}; give bert-base-uncased's"
        )
    if len(words.keys() | {"[DEC]"}) != rows:
        raise UserError(
            f"{file} has {len(words)} words, with [DEC] {len(words.keys() | {'[DEC]'})}, but the "
            f"Q-Former has {rows} embedding rows; give bert-base-uncased's"
        )
    backend = tk.Tokenizer(tk.models.WordPiece(words, unk_token="[UNK]"))
    backend.normalizer = tk.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tk.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tk.decoders.WordPiece()
    backend.post_processor = tk.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, words[token]) for token in ("[CLS]", "[SEP]")],
    )
    backend.add_special_tokens([*BERT_TOKENS, "[DEC]"])
    settings = dict(
        bos_token="[DEC]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        truncation_side="left",
    )
    return Tokenizer(backend, settings)


def read_llm_tokenizer(directory: str | pathlib.Path, rows: int) -> Tokenizer:
    """Vicuna's tokenizer as LAVIS changes it; arguments and errors as for :func:`read_tokenizers`.

    Of ``tokenizer.model`` and ``tokenizer.json`` the first is taken, which is what LAVIS reads; the
    result keeps it.
    """
    import tokenizers as tk

    directory = pathlib.Path(directory)
    model_file, json_file = directory / PIECES, directory / RULES
    if model_file.is_file():
        file, reference = model_file, _sentencepiece(model_file)
        pieces, merges = _pieces(reference)
    elif json_file.is_file():
        file, reference = json_file, None
        pieces, merges = _byte_pairs(json_file)
    else:
        raise UserError(
            f"{directory}: no tokenizer.model or tokenizer.json here; copy the tokenizer files of "
            "the checkpoint into it"
        )
    needed = [*LLAMA_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    if missing := [token for token in needed if token not in pieces]:
        raise UserError(f"{file} is no LLaMA tokenizer: it has no {missing[0]}; give Vicuna's")
    if not len(pieces) <= rows <= len(pieces) + ROW_MULTIPLE:
        raise UserError(
            f"{file} has {len(pieces)} pieces, but the language model has {rows} embedding rows; "
            "give the tokenizer that belongs to these weights"
        )
    model = tk.models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tk.Tokenizer(model)
    backend.normalizer = tk.normalizers.Sequence(
        [tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = tk.decoders.Sequence(
        [
            tk.decoders.Replace("▁", " "),
            tk.decoders.ByteFallback(),
            tk.decoders.Fuse(),
            tk.decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = tk.processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s>:1 $B:1", special_tokens=[("</s>", pieces["</s>"])]
    )
    if reference is not None:
        for probe in _PROBES:
            if backend.encode(probe, add_special_tokens=False).ids != reference.encode(probe):
                raise UserError(
                    f"{file} is no LLaMA tokenizer: {probe!r} comes out differently under LLaMA's "
                    "rules; give Vicuna's"
                )
    pad = "[PAD]" if rows > len(pieces) else "<unk>"
    backend.add_special_tokens([*LLAMA_TOKENS, pad])
    settings = dict(
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token=pad,
        truncation_side="left",
        padding_side="left",
    )
    return Tokenizer(backend, settings, model_file if reference else None)


def check_vicuna(llm_dir: str | pathlib.Path, allow: str = "") -> str:
    """Tells the versions of Vicuna apart and refuses those that InstructBLIP was not trained with.

    v1.1 is LLaMA-1, v1.5 is Llama-2: other weights of the same shapes, with which InstructBLIP's
    answers are nonsense. Vicuna v1.3 is LLaMA-1 too and has the same files as v1.1: it passes.

    Args:
      llm_dir: with ``config.json``, of Vicuna or of an InstructBLIP, and ``tokenizer_config.json``.
      allow: a version to accept besides v1.1, as this function names it.

    Returns:
      ``v1.1``, ``v1.5``, ``unknown``, or ``""`` for a model of other sizes, which passes.

    Raises:
      UserError: for a version that is not to be used, or a file that cannot be read.
    """
    directory = pathlib.Path(llm_dir)
    config = read_json(directory / "config.json")
    config = config.get("text_config") or config
    # Hugging Face leaves out what is LLaMA-1's default.
    size = (config.get("hidden_size", 4096), config.get("num_hidden_layers", 32))
    if size not in VICUNAS:
        return ""
    positions, eps = config.get("max_position_embeddings", 2048), config.get("rms_norm_eps", 1e-6)
    found = f"max_position_embeddings {positions}, rms_norm_eps {eps}"
    version = {(2048, 1e-6): "v1.1", (4096, 1e-5): "v1.5"}.get((positions, eps), "unknown")
    settings = directory / SETTINGS
    length = read_json(settings).get("model_max_length") if settings.is_file() else None
    # Where the length is not set, transformers writes a number of thirty digits.
    if version == "v1.1" and isinstance(length, int) and 2048 < length < 10**9:
        version = "unknown"
        found += f", model_max_length {length}"
    if version not in ("v1.1", allow):
        name = (
            f"{VICUNAS[size]} {version}" if version != "unknown" else "neither Vicuna v1.1 nor v1.5"
        )
        raise UserError(
            f"{directory} is {name} ({found}): InstructBLIP's weights were trained with v1.1 and "
            f"answer nonsense with another; give v1.1, or pass --allow-llm {version} if yours were "
            "trained with this one"
        )
    return version


def _content(token: Any) -> str | None:
    """A special token in a settings file: a string, or a table with flags of its own."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _add_tokens(backend: Any, tokens: Iterable[Any], flags: Mapping[str, bool] = {}) -> None:
    """Adds the tokens of a settings file that a tokenizer lacks.

    Args:
      backend: a ``tokenizers.Tokenizer``.
      tokens: strings, which are special tokens, or tables with flags of their own.
      flags: that count before those.
    """
    from tokenizers import AddedToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in tokens:
        content = _content(token)
        if content and content not in known:
            own = token if isinstance(token, dict) else {"content": content, "special": True}
            own = {name: value for name, value in own.items() if name != "__type"}
            backend.add_tokens([AddedToken(**{**own, **flags})])


def _words(path: pathlib.Path) -> tuple[dict[str, int], pathlib.Path]:
    """BERT's vocabulary, and the file that it was found in."""
    candidates = [path] if path.is_file() else [path / "vocab.txt", path / RULES]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise UserError(
            f"{path}: no vocab.txt or tokenizer.json of the Q-Former here; copy the vocab.txt of "
            "bert-base-uncased there, or pass it as --bert"
        )
    check_pointer(file)
    if file.suffix == ".json":
        words = _model_of(file, "WordPiece")["vocab"]
        if not isinstance(words, dict):
            raise UserError(f"{file} is damaged: its vocabulary is no table; copy it again")
        return words, file
    try:
        # Not str.splitlines: it also splits at characters that are words of the vocabulary.
        with file.open(encoding="utf-8") as lines:
            return {line.rstrip("\n"): number for number, line in enumerate(lines)}, file
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8 ({error.reason}); copy it again") from None


def _sentencepiece(file: pathlib.Path) -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise UserError(
            f"{file} is read by sentencepiece; pip install 'adacm2-jax[port]'"
        ) from None
    check_pointer(file)
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{file} is no sentencepiece model ({reason(error)}); copy it again"
        ) from None


def _pieces(model: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: a piece may arise from any two that make it up, the best score first.

    The order of the ids would not do: runs of spaces have low ids and the worst scores.
    """
    pieces = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    written = {
        piece: i
        for piece, i in pieces.items()
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
    }
    merges: list[tuple[str, str]] = []
    for piece in sorted(written, key=lambda piece: -model.get_score(written[piece])):
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        halves = [pair for pair in halves if pair[0] in written and pair[1] in written]
        merges += sorted(halves, key=lambda pair: (written[pair[0]], written[pair[1]]))
    return pieces, merges


def _byte_pairs(file: pathlib.Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a ``tokenizer.json``, old (``"a b"``) or new (``["a", "b"]``)."""
    model = _model_of(file, "BPE")
    try:
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        return dict(model["vocab"]), [(left, right) for left, right in pairs]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error!r}); copy it again") from None


def _model_of(file: pathlib.Path, kind: str) -> dict:
    """The model in a ``tokenizer.json``, which must be of this kind."""
    model = read_json(file).get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise UserError(f"{file} is damaged: it holds no vocabulary; copy it again")
    # Files of old versions do not name the kind.
    found = model.get("type", kind)
    if found != kind:
        raise UserError(f"{file} holds a {found} tokenizer, not {kind}; give the checkpoint's own")
    return model
