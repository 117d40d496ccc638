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

An embedding table has 32,000, 32,001 or 32,064 rows. In a table of 32,000, Vicuna's own, there is
no row for ``[PAD]``: padding is then ``<unk>``, id 0, which has one. Any row will do, since padding
is masked; ``</s>`` would too, but makes an end look like padding. A table of 32,064 is Hugging
Face's, filled up to a multiple of 64; its row 32001 is ``<image>``, where transformers puts the
visual tokens. Ours go in directly, so ``<image>`` in a question is mere text, as it is for LAVIS.
"""

import json
import pathlib
from typing import Any

from adacm2_jax.errors import UserError

BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LLAMA_TOKENS = ("<unk>", "<s>", "</s>")
#: Tables are filled up to a multiple of this.
ROW_MULTIPLE = 64
#: (width, layers) → the language models of InstructBLIP that come in versions.
VICUNAS = {(4096, 32): "Vicuna-7B", (5120, 40): "Vicuna-13B"}
#: What must come out of a tokenizer.model as the sentencepiece library has it.
_PROBES = ("", "  What  is\tit?\n", "Überraschung: 100,000 naïve 日本語 🙂!")


def read_tokenizers(
    llm_dir: str | pathlib.Path,
    bert_dir: str | pathlib.Path | None,
    llm_rows: int,
    bert_rows: int,
) -> tuple[Any, Any]:
    """Both tokenizers of a checkpoint, with LAVIS's special tokens.

    Args:
      llm_dir: a Hugging Face InstructBLIP, or a Vicuna.
      bert_dir: ``qformer_tokenizer/`` beside it, a bert-base-uncased, or a ``vocab.txt``.
      llm_rows: of the language model's embedding table.
      bert_rows: of the Q-Former's.

    Returns:
      The Q-Former's and the language model's, each a ``transformers.PreTrainedTokenizerFast``.

    Raises:
      UserError: for a file that is missing, damaged, or does not fit the table.
    """
    if bert_dir is None:
        raise UserError(
            "the source holds no tokenizer for the Q-Former; pass --bert with the directory of "
            "bert-base-uncased, or with its vocab.txt"
        )
    return read_qformer_tokenizer(bert_dir, bert_rows), read_llm_tokenizer(llm_dir, llm_rows)


def read_qformer_tokenizer(path: str | pathlib.Path, rows: int) -> Any:
    """BERT's tokenizer with ``[DEC]``; arguments and errors as for :func:`read_tokenizers`."""
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast

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
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="[DEC]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        truncation_side="left",
        clean_up_tokenization_spaces=False,
    )


def read_llm_tokenizer(directory: str | pathlib.Path, rows: int) -> Any:
    """Vicuna's tokenizer as LAVIS changes it; arguments and errors as for :func:`read_tokenizers`.

    Of ``tokenizer.model`` and ``tokenizer.json`` the first is taken, which is what LAVIS reads; the
    result's ``vocab_file`` then names it, so that :meth:`Processor.save` can keep a copy.
    """
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast

    directory = pathlib.Path(directory)
    model_file, json_file = directory / "tokenizer.model", directory / "tokenizer.json"
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
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token=pad,
        truncation_side="left",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    if reference is not None:
        tokenizer.vocab_file = str(model_file)
    return tokenizer


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
    config = _read_json(directory / "config.json")
    config = config.get("text_config") or config
    # Hugging Face leaves out what is LLaMA-1's default.
    size = (config.get("hidden_size", 4096), config.get("num_hidden_layers", 32))
    if size not in VICUNAS:
        return ""
    positions, eps = config.get("max_position_embeddings", 2048), config.get("rms_norm_eps", 1e-6)
    found = f"max_position_embeddings {positions}, rms_norm_eps {eps}"
    version = {(2048, 1e-6): "v1.1", (4096, 1e-5): "v1.5"}.get((positions, eps), "unknown")
    settings = directory / "tokenizer_config.json"
    length = _read_json(settings).get("model_max_length") if settings.is_file() else None
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


def _words(path: pathlib.Path) -> tuple[dict[str, int], pathlib.Path]:
    """BERT's vocabulary, and the file that it was found in."""
    candidates = [path] if path.is_file() else [path / "vocab.txt", path / "tokenizer.json"]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise UserError(
            f"{path}: no vocab.txt or tokenizer.json of the Q-Former here; copy the vocab.txt of "
            "bert-base-uncased there, or pass it as --bert"
        )
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
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(f"{file} is no sentencepiece model ({reason}); copy it again") from None


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
    model = _read_json(file).get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise UserError(f"{file} is damaged: it holds no vocabulary; copy it again")
    # Files of old versions do not name the kind.
    found = model.get("type", kind)
    if found != kind:
        raise UserError(f"{file} holds a {found} tokenizer, not {kind}; give the checkpoint's own")
    return model


def _read_json(file: pathlib.Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; copy it from where the checkpoint is") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); copy it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: it holds no table; copy it again")
    return values
