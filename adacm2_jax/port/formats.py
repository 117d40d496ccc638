"""What a PyTorch checkpoint is: which files, which names, which model.

A checkpoint is a list of paths, each recognised by what it holds; a later one lies over an earlier:

* a Hugging Face directory (``config.json`` of an InstructBLIP, weights, tokenizers);
* LAVIS's parts: ``eva_vit_g.pth``, ``instruct_blip_vicuna7b_trimmed.pth`` and a directory with
  Vicuna;
* MA-LMM's ``checkpoint_best.pth``, over either.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence

from adacm2_jax.config import (
    AdaCM2Config,
    LlamaConfig,
    QFormerConfig,
    VisionConfig,
    instructblip_vicuna_7b,
)
from adacm2_jax.errors import UserError
from adacm2_jax.port import names
from adacm2_jax.port.rules import Part
from adacm2_jax.port.source import Source, checkpoint_files

#: Epsilon of ln_vision: PyTorch's default in LAVIS and MA-LMM, the ViT's own in Hugging Face.
LAVIS_LN_VISION_EPS = 1e-5
HUGGING_FACE, VICUNA, EVA, LAVIS = "hugging face", "vicuna", "eva vit", "lavis"


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
    settings = json.loads((llm_dir / "config.json").read_text())
    image_token = settings.get("image_token_index", settings.get("video_token_index"))
    files = [sources[path] for path in paths]
    return TorchCheckpoint(config, files, parts, llm_dir, bert_dir, image_token)


def hugging_face_config(directory: pathlib.Path) -> AdaCM2Config:
    """The model of an InstructBLIP directory.

    Raises:
      UserError: for a language model, an activation or a feature that ours does not have.
    """
    import transformers

    c = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    where = directory / "config.json"
    v, q = c.vision_config, c.qformer_config
    text, answer = _lengths(q.max_position_embeddings, c.num_query_tokens, c.text_config)
    _must(where, "vision_config.hidden_act", v.hidden_act, "gelu")
    _must(where, "vision_config.qkv_bias", v.qkv_bias, True)
    _must(where, "qformer_config.hidden_act", q.hidden_act, "gelu")
    _must(where, "qformer_config.encoder_hidden_size", q.encoder_hidden_size, v.hidden_size)
    return AdaCM2Config(
        vision=VisionConfig(
            image_size=v.image_size,
            patch_size=v.patch_size,
            width=v.hidden_size,
            depth=v.num_hidden_layers,
            num_heads=v.num_attention_heads,
            mlp_width=v.intermediate_size,
            layer_norm_eps=v.layer_norm_eps,
        ),
        qformer=QFormerConfig(
            vocab_size=q.vocab_size,
            width=q.hidden_size,
            depth=q.num_hidden_layers,
            num_heads=q.num_attention_heads,
            mlp_width=q.intermediate_size,
            cross_attention_every=q.cross_attention_frequency,
            num_queries=c.num_query_tokens,
            max_positions=q.max_position_embeddings,
            layer_norm_eps=q.layer_norm_eps,
            dropout=q.hidden_dropout_prob,
        ),
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
    return LlamaConfig(
        vocab_size=c.vocab_size,
        width=c.hidden_size,
        depth=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        mlp_width=c.intermediate_size,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=float(rope.get("rope_theta", getattr(c, "rope_theta", 10000.0))),
        max_positions=c.max_position_embeddings,
        tie_embeddings=bool(c.tie_word_embeddings),
    )


def to_hugging_face_config(config: AdaCM2Config, dtype: str, image_token: int | None):
    """``transformers.InstructBlipConfig`` of a model: :func:`hugging_face_config`, backwards."""
    import transformers

    v, q, t = config.vision, config.qformer, config.llm
    text = dict(
        model_type="llama",
        vocab_size=t.vocab_size,
        hidden_size=t.width,
        num_hidden_layers=t.depth,
        num_attention_heads=t.num_heads,
        num_key_value_heads=t.num_kv_heads,
        intermediate_size=t.mlp_width,
        rms_norm_eps=t.rms_norm_eps,
        rope_theta=t.rope_theta,
        max_position_embeddings=t.max_positions,
        tie_word_embeddings=t.tie_embeddings,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=min(32000, t.vocab_size - 1),
    )
    if int(transformers.__version__.split(".")[0]) >= 5:
        text["rope_parameters"] = dict(rope_type="default", rope_theta=text.pop("rope_theta"))
    return transformers.InstructBlipConfig(
        vision_config=dict(
            image_size=v.image_size,
            patch_size=v.patch_size,
            hidden_size=v.width,
            num_hidden_layers=v.depth,
            num_attention_heads=v.num_heads,
            intermediate_size=v.mlp_width,
            layer_norm_eps=v.layer_norm_eps,
        ),
        qformer_config=dict(
            vocab_size=q.vocab_size,
            hidden_size=q.width,
            num_hidden_layers=q.depth,
            num_attention_heads=q.num_heads,
            intermediate_size=q.mlp_width,
            cross_attention_frequency=q.cross_attention_every,
            max_position_embeddings=q.max_positions,
            layer_norm_eps=q.layer_norm_eps,
            hidden_dropout_prob=q.dropout,
            attention_probs_dropout_prob=q.dropout,
            encoder_hidden_size=v.width,
        ),
        text_config=text,
        num_query_tokens=q.num_queries,
        image_token_index=image_token,
        architectures=["InstructBlipForConditionalGeneration"],
        dtype=dtype,
    )


def _kind(path: pathlib.Path) -> str:
    if path.is_file():
        return LAVIS
    if not path.exists():
        raise UserError(f"--src {path}: no such file or directory")
    try:
        model_type = json.loads((path / "config.json").read_text())["model_type"]
    except FileNotFoundError:
        raise UserError(f"--src {path}: a directory needs the config.json of its model") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'config.json'} is damaged ({error!r})") from None
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
    import transformers

    shapes = {name: shape for source in sources for name, shape in source.shapes.items()}
    needed = {
        "visual_encoder.pos_embed": "the ViT (eva_vit_g.pth)",
        "query_tokens": "the Q-Former (instruct_blip_vicuna7b_trimmed.pth)",
    }
    for name, what in needed.items():
        if name not in shapes:
            raise UserError(f"--src lacks {what}: no part holds {name}")

    def count(pattern: str) -> int:
        found = (re.match(pattern, name) for name in shapes)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    base = instructblip_vicuna_7b()
    width = shapes["visual_encoder.pos_embed"][2]
    patch = shapes["visual_encoder.patch_embed.proj.weight"][2]
    depth = count(r"visual_encoder\.blocks\.(\d+)\.")
    where = vicuna / "config.json"
    llm = transformers.AutoConfig.from_pretrained(vicuna, local_files_only=True)
    layer = r"Qformer\.bert\.encoder\.layer\."
    words = shapes["Qformer.bert.embeddings.word_embeddings.weight"]
    positions = shapes["Qformer.bert.embeddings.position_embeddings.weight"][0]
    readers = count(rf"{layer}(\d+)\.crossattention\.")
    qformer_depth = count(rf"{layer}(\d+)\.attention\.")
    queries = shapes["query_tokens"][1]
    text, answer = _lengths(positions, queries, llm)
    return AdaCM2Config(
        vision=VisionConfig(
            image_size=round((shapes["visual_encoder.pos_embed"][1] - 1) ** 0.5) * patch,
            patch_size=patch,
            width=width,
            depth=39 if depth == 40 else depth,
            num_heads=base.vision.num_heads,
            mlp_width=shapes["visual_encoder.blocks.0.mlp.fc1.weight"][0],
        ),
        qformer=QFormerConfig(
            vocab_size=words[0],
            width=words[1],
            depth=qformer_depth,
            num_heads=base.qformer.num_heads,
            mlp_width=shapes["Qformer.bert.encoder.layer.0.intermediate.dense.weight"][0],
            cross_attention_every=qformer_depth - readers + 1,
            num_queries=queries,
            max_positions=positions,
        ),
        llm=dataclasses.replace(
            llama_config(llm, where), vocab_size=shapes["llm_model.model.embed_tokens.weight"][0]
        ),
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
