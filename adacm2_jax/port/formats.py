"""What a PyTorch checkpoint is: which files, which names, which model.

A checkpoint is a list of paths, each recognised by what it holds; a later one lies over an earlier:

* a Hugging Face directory (``config.json`` of an InstructBLIP, weights, tokenizers);
* LAVIS's parts: ``eva_vit_g.pth``, ``instruct_blip_vicuna7b_trimmed.pth`` and a directory with
  Vicuna;
* MA-LMM's ``checkpoint_best.pth``, over either.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adacm2_jax.config import (
    AdaCM2Config,
    LlamaConfig,
    QFormerConfig,
    VisionConfig,
    instructblip_vicuna_7b,
)
from adacm2_jax.errors import UserError, reason
from adacm2_jax.files import read_json
from adacm2_jax.models.params import param_shapes
from adacm2_jax.port import names
from adacm2_jax.port.rules import Part, Shape, match
from adacm2_jax.port.source import Source, checkpoint_files

#: Epsilon of ln_vision: PyTorch's default in LAVIS and MA-LMM, the ViT's own in Hugging Face.
LAVIS_LN_VISION_EPS = 1e-5
HUGGING_FACE, VICUNA, EVA, LAVIS = "hugging face", "vicuna", "eva vit", "lavis"
_NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
#: Our field → Hugging Face's, of each network.
_COMMON = dict(
    width="hidden_size",
    depth="num_hidden_layers",
    num_heads="num_attention_heads",
    mlp_width="intermediate_size",
)
_VISION = _COMMON | {n: n for n in ("image_size", "patch_size", "layer_norm_eps")}
_TEXT = _COMMON | dict(vocab_size="vocab_size", max_positions="max_position_embeddings")
_QFORMER = _TEXT | dict(
    cross_attention_every="cross_attention_frequency",
    layer_norm_eps="layer_norm_eps",
    dropout="hidden_dropout_prob",
)
_LLM = _TEXT | dict(
    num_kv_heads="num_key_value_heads",
    rms_norm_eps="rms_norm_eps",
    tie_embeddings="tie_word_embeddings",
)


@dataclasses.dataclass
class TorchCheckpoint:
    """A checkpoint that has been recognised, with nothing but its headers read.

    Attributes:
      config: the model that it holds.
      sources: its files, in the order in which they were given.
      parts: the same, as ``rules.match`` wants them.
      llm_dir: the directory with the language model's tokenizer and ``config.json``.
      bert_dir: the directory with the Q-Former's tokenizer, if it came with the weights.
      image_token: of Hugging Face's prompts, the placeholder of a visual token.
    """

    config: AdaCM2Config
    sources: list[Source]
    parts: list[Part]
    llm_dir: pathlib.Path
    bert_dir: pathlib.Path | None
    image_token: int | None = None

    def close(self) -> None:
        for source in self.sources:
            source.close()


class TorchParams:
    """The parameters of a recognised checkpoint as ours, read layer by layer.

    Args:
      source: the checkpoint.

    Attributes:
      shapes: path → shape.
      dtypes: path → dtype; float32 where layers differ.
      layers: path → how many pieces along axis 0 it is read in; None for one piece, the whole.
      origins: path → number of the part that it is from, and a ``Piece`` a layer.

    Raises:
      UserError: with a readable difference, if names or shapes do not fit.
    """

    def __init__(self, source: TorchCheckpoint):
        shapes = param_shapes(source.config)
        self._sources = source.sources
        self.origins = dict(sorted(match(shapes, source.parts).items()))
        self.shapes = {path: shapes[path] for path in self.origins}
        self.dtypes: dict[str, np.dtype] = {}
        self.layers: dict[str, int | None] = {}
        for path, (number, pieces) in self.origins.items():
            kinds = {numpy_dtype(source.sources[number].dtypes[piece.name]) for piece in pieces}
            self.dtypes[path] = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
            single = len(pieces) == 1 and pieces[0].shape == shapes[path]
            self.layers[path] = None if single else len(pieces)

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """A parameter that is read in one piece, or one layer of another."""
        number, pieces = self.origins[path]
        piece = pieces[layer or 0]
        values = self._sources[number].read(piece.name, piece.rows)
        return piece.layout.to_ours(values, piece.shape).astype(self.dtypes[path], copy=False)


def numpy_dtype(name: str) -> np.dtype:
    """The dtype of this name.

    Raises:
      UserError: for one that no parameter has.
    """
    import ml_dtypes

    known = {"float64", "float32", "float16", "bfloat16"}
    if name not in known:
        raise UserError(f"dtype {name} is not one of {', '.join(sorted(known))}")
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def open_checkpoint(given: Sequence[str | pathlib.Path]) -> TorchCheckpoint:
    """Recognises the parts of a checkpoint and derives the model's configuration.

    Raises:
      UserError: for a path that is none of the known kinds, a combination that is no whole model,
        or a configuration that AdaCM² cannot run.
    """
    paths = [pathlib.Path(path) for path in given]
    kinds = {path: _kind(path) for path in paths}
    sources = {path: _source(path, kind) for path, kind in kinds.items()}
    for path, kind in kinds.items():
        if kind == LAVIS and any(name.startswith("blocks.") for name in sources[path].shapes):
            kinds[path] = EVA
            sources[path] = _source(path, EVA)
    whole = [path for path in paths if kinds[path] == HUGGING_FACE]
    llms = [path for path in paths if kinds[path] == VICUNA]
    if len(whole) > 1 or len(llms) > 1 or (whole and llms):
        raise UserError(
            f"--src names {len(whole)} InstructBLIP and {len(llms)} language-model directories; "
            "give one Hugging Face InstructBLIP, or LAVIS's parts with one Vicuna"
        )
    laid_over = any(kinds[path] == LAVIS for path in paths)
    if whole:
        config = hugging_face_config(whole[0])
        llm_dir, bert_dir = whole[0], whole[0] / "qformer_tokenizer"
    elif llms:
        config = _lavis_config(llms[0], sources.values())
        llm_dir, bert_dir = llms[0], None
    else:
        raise UserError(
            f"{', '.join(map(str, paths))}: no language model among these; add the directory of a "
            "Vicuna, or of a Hugging Face InstructBLIP"
        )
    if laid_over:
        config = dataclasses.replace(config, ln_vision_eps=LAVIS_LN_VISION_EPS)
    rows = [
        s.shapes["image_pe.weight"][0] for s in sources.values() if "image_pe.weight" in s.shapes
    ]
    if rows:
        config = dataclasses.replace(config, temporal_positions=rows[-1])
    tables = {HUGGING_FACE: names.hf_table(config)}
    lavis = names.lavis_table(config)
    parts = [
        Part(str(path), tables.get(kinds[path], lavis), sources[path].shapes) for path in paths
    ]
    settings = read_json(llm_dir / "config.json")
    image_token = settings.get("image_token_index", settings.get("video_token_index"))
    files = [sources[path] for path in paths]
    return TorchCheckpoint(config, files, parts, llm_dir, bert_dir, image_token)


def hugging_face_config(directory: pathlib.Path) -> AdaCM2Config:
    """The model of an InstructBLIP directory.

    Raises:
      UserError: for a language model, an activation or a feature that ours does not have.
    """
    c, where = _auto_config(directory), directory / "config.json"
    v, q = c.vision_config, c.qformer_config
    text, answer = _lengths(q.max_position_embeddings, c.num_query_tokens, c.text_config)
    _must(where, "vision_config.hidden_act", v.hidden_act, "gelu")
    _must(where, "vision_config.qkv_bias", v.qkv_bias, True)
    _must(where, "qformer_config.hidden_act", q.hidden_act, "gelu")
    _must(where, "qformer_config.encoder_hidden_size", q.encoder_hidden_size, v.hidden_size)
    return AdaCM2Config(
        vision=VisionConfig(**_ours(v, _VISION)),
        qformer=QFormerConfig(num_queries=c.num_query_tokens, **_ours(q, _QFORMER)),
        llm=llama_config(c.text_config, where),
        ln_vision_eps=v.layer_norm_eps,
        max_text_len=text,
        max_answer_len=answer,
    )


def llama_config(c, where: pathlib.Path) -> LlamaConfig:
    """Ours for a ``transformers.LlamaConfig``.

    Raises:
      UserError: if it is another architecture, or uses what ours does not have.
    """
    _must(where, "model_type of the language model", c.model_type, "llama")
    _must(where, "hidden_act of the language model", c.hidden_act, "silu")
    for field in ("attention_bias", "mlp_bias"):
        _must(where, f"{field} of the language model", getattr(c, field, False), False)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    _must(where, "head_dim", head_dim, c.hidden_size // c.num_attention_heads)
    rope: dict = getattr(c, "rope_parameters", None) or getattr(c, "rope_scaling", None) or {}
    _must(where, "rope_type", rope.get("rope_type", "default"), "default")
    theta = rope.get("rope_theta", getattr(c, "rope_theta", 10000.0))
    return LlamaConfig(rope_theta=float(theta), **_ours(c, _LLM))


def to_hugging_face_config(config: AdaCM2Config, dtype: str, image_token: int | None):
    """``transformers.InstructBlipConfig`` of a model: :func:`hugging_face_config`, backwards."""
    transformers = import_transformers()
    v, q, t = config.vision, config.qformer, config.llm
    text = _theirs(t, _LLM) | dict(
        model_type="llama",
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=min(32000, t.vocab_size - 1),
    )
    if int(transformers.__version__.split(".")[0]) >= 5:
        text["rope_parameters"] = dict(rope_type="default", rope_theta=t.rope_theta)
    else:
        text["rope_theta"] = t.rope_theta
    return transformers.InstructBlipConfig(
        vision_config=_theirs(v, _VISION),
        qformer_config=_theirs(q, _QFORMER)
        | dict(attention_probs_dropout_prob=q.dropout, encoder_hidden_size=v.width),
        text_config=text,
        num_query_tokens=q.num_queries,
        image_token_index=image_token,
        architectures=["InstructBlipForConditionalGeneration"],
        dtype=dtype,
    )


def import_transformers():
    """The library, without its advice to install torch, which only pickles and --verify need."""
    given = os.environ.get(_NO_ADVICE, "")
    os.environ[_NO_ADVICE] = "1"
    try:
        import transformers
    finally:
        os.environ[_NO_ADVICE] = given
    return transformers


def _auto_config(directory: pathlib.Path) -> Any:
    transformers = import_transformers()
    try:
        return transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever a wrong value makes its classes raise
        raise UserError(
            f"{directory / 'config.json'} is no configuration that transformers "
            f"{transformers.__version__} reads ({type(error).__name__}: {reason(error)}); copy it "
            "again from where the checkpoint is"
        ) from error


def _ours(theirs: Any, fields: Mapping[str, str]) -> dict[str, Any]:
    return {name: getattr(theirs, other) for name, other in fields.items()}


def _theirs(ours: Any, fields: Mapping[str, str]) -> dict[str, Any]:
    return {other: getattr(ours, name) for name, other in fields.items()}


def _kind(path: pathlib.Path) -> str:
    if path.is_file():
        return LAVIS
    if not path.exists():
        raise UserError(f"--src {path}: no such file or directory")
    if not (path / "config.json").is_file():
        raise UserError(f"--src {path}: a directory needs the config.json of its model")
    model_type = read_json(path / "config.json").get("model_type")
    if model_type in ("instructblip", "instructblipvideo"):
        return HUGGING_FACE
    if model_type == "llama":
        return VICUNA
    raise UserError(
        f"{path / 'config.json'}: model_type is {model_type!r}; known are instructblip, "
        "instructblipvideo, and llama for LAVIS's language model"
    )


def _source(path: pathlib.Path, kind: str) -> Source:
    files = checkpoint_files(path) if path.is_dir() else [path]
    prefix = {VICUNA: "llm_model.", EVA: "visual_encoder."}.get(kind, "")
    return Source(files, lambda name: prefix + name)


def _lavis_config(vicuna: pathlib.Path, sources) -> AdaCM2Config:
    """The sizes of LAVIS's parts, read off their shapes; heads are those of ViT-g and BERT-base."""
    shapes: dict[str, Shape] = {name: s for source in sources for name, s in source.shapes.items()}

    def size(name: str, axis: int = 0) -> int:
        if name not in shapes or len(shapes[name]) <= axis:
            what = "the Q-Former (instruct_blip_vicuna7b_trimmed.pth)"
            what = "the ViT (eva_vit_g.pth)" if name.startswith("visual_encoder.") else what
            what = f"the weights of {vicuna}" if name.startswith("llm_model.") else what
            raise UserError(f"--src lacks {what}: no part holds {name}")
        return shapes[name][axis]

    def count(pattern: str) -> int:
        found = (re.match(pattern, name) for name in shapes)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    base = instructblip_vicuna_7b()
    patch = size("visual_encoder.patch_embed.proj.weight", 2)
    depth = count(r"visual_encoder\.blocks\.(\d+)\.")
    layer = r"Qformer\.bert\.encoder\.layer\."
    qformer_depth = count(rf"{layer}(\d+)\.attention\.")
    positions = size("Qformer.bert.embeddings.position_embeddings.weight")
    queries = size("query_tokens", 1)
    settings = _auto_config(vicuna)
    text, answer = _lengths(positions, queries, settings)
    llm = llama_config(settings, vicuna / "config.json")
    return AdaCM2Config(
        vision=VisionConfig(
            image_size=round((size("visual_encoder.pos_embed", 1) - 1) ** 0.5) * patch,
            patch_size=patch,
            width=size("visual_encoder.pos_embed", 2),
            depth=39 if depth == 40 else depth,
            num_heads=base.vision.num_heads,
            mlp_width=size("visual_encoder.blocks.0.mlp.fc1.weight"),
        ),
        qformer=QFormerConfig(
            vocab_size=size("Qformer.bert.embeddings.word_embeddings.weight"),
            width=size("Qformer.bert.embeddings.word_embeddings.weight", 1),
            depth=qformer_depth,
            num_heads=base.qformer.num_heads,
            mlp_width=size("Qformer.bert.encoder.layer.0.intermediate.dense.weight"),
            cross_attention_every=qformer_depth - count(rf"{layer}(\d+)\.crossattention\.") + 1,
            num_queries=queries,
            max_positions=positions,
        ),
        llm=dataclasses.replace(llm, vocab_size=size("llm_model.model.embed_tokens.weight")),
        ln_vision_eps=LAVIS_LN_VISION_EPS,
        max_text_len=text,
        max_answer_len=answer,
    )


def _lengths(positions: int, queries: int, llm) -> tuple[int, int]:
    """Text limits: InstructBLIP's 128 and 256, or what a smaller model has room for."""
    text = min(128, positions, max(1, (llm.max_position_embeddings - queries) // 2))
    answer = min(256, max(1, llm.max_position_embeddings - queries - text))
    return text, answer


def _must(where: pathlib.Path, field: str, value, needed) -> None:
    if value != needed:
        raise UserError(f"{where}: {field} is {value!r}; AdaCM² has {needed!r} only")
