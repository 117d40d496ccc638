"""Small PyTorch checkpoints on disk, in the layouts in which the large ones are published."""

import pathlib

import torch

from adacm2_jax.config import AdaCM2Config
from tests.parity import oracle
from tests.port.checkpoints import config, read_json, write_pieces, write_words

__all__ = ["config", "read_json", "write_pieces", "write_words"]


def write_hugging_face(directory: pathlib.Path, model, shard: str = "400KB") -> pathlib.Path:
    """A directory as ``Salesforce/instructblip-vicuna-7b`` has it, in several shards."""
    model.save_pretrained(directory, max_shard_size=shard)
    write_pieces(directory)
    write_words(directory / "qformer_tokenizer")
    return directory


def lavis_names(state: dict) -> dict:
    """Hugging Face's tensors under LAVIS's names; written down a second time, tensor by tensor."""
    named = {}
    for name, tensor in state.items():
        head, _, rest = name.partition(".")
        if head == "vision_model":
            named |= _eva(rest, tensor)
        elif head == "qformer":
            rest = rest.replace("attention.attention.", "attention.self.")
            rest = rest.replace("embeddings.layernorm.", "embeddings.LayerNorm.")
            named[f"Qformer.bert.{rest}"] = tensor
        elif head == "language_model":
            named[f"llm_model.{rest}"] = tensor
        elif head == "language_projection":
            named[f"llm_proj.{rest}"] = tensor
        else:
            assert name == "query_tokens"
            named[name] = tensor
    return named


def _eva(name: str, tensor: torch.Tensor) -> dict:
    whole = {
        "embeddings.class_embedding": "visual_encoder.cls_token",
        "embeddings.position_embedding": "visual_encoder.pos_embed",
        "embeddings.patch_embedding.weight": "visual_encoder.patch_embed.proj.weight",
        "embeddings.patch_embedding.bias": "visual_encoder.patch_embed.proj.bias",
        "post_layernorm.weight": "ln_vision.weight",
        "post_layernorm.bias": "ln_vision.bias",
    }
    if name in whole:
        return {whole[name]: tensor}
    _, _, number, *rest = name.split(".")
    block, part = f"visual_encoder.blocks.{number}", ".".join(rest)
    if part == "self_attn.qkv.bias":
        query, key, value = tensor.chunk(3)
        assert not key.any()
        return {f"{block}.attn.q_bias": query, f"{block}.attn.v_bias": value}
    for theirs, ours in (
        ("self_attn.projection", "attn.proj"),
        ("self_attn.qkv", "attn.qkv"),
        ("layer_norm1", "norm1"),
        ("layer_norm2", "norm2"),
    ):
        part = part.replace(theirs, ours)
    return {f"{block}.{part}": tensor}


def write_lavis(directory: pathlib.Path, model, extras: bool = True) -> list[pathlib.Path]:
    """``eva_vit_g.pth``, ``instruct_blip_vicuna7b_trimmed.pth``, ``vicuna/`` and ``bert/``."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.clone() for name, tensor in lavis_names(model.state_dict()).items()}
    eva = {n.removeprefix("visual_encoder."): t for n, t in state.items() if "visual_enc" in n}
    rest = {n: t for n, t in state.items() if not n.startswith(("visual_encoder.", "llm_model."))}
    if extras:  # what the published files may carry besides
        eva["norm.weight"] = torch.ones(4)
        rest["Qformer.bert.embeddings.position_ids"] = torch.arange(4)[None]
        rest["Qformer.cls.predictions.bias"] = torch.zeros(3)
    torch.save(eva, directory / "eva_vit_g.pth")
    torch.save({"model": rest}, directory / "instruct_blip_vicuna7b_trimmed.pth")
    model.language_model.save_pretrained(directory / "vicuna")
    write_pieces(directory / "vicuna")
    write_words(directory / "bert")
    parts = ["eva_vit_g.pth", "instruct_blip_vicuna7b_trimmed.pth", "vicuna"]
    return [directory / part for part in parts]


def write_ma_lmm(path: pathlib.Path, model, rows: int, seed: int) -> dict:
    """``checkpoint_best.pth`` of a fine-tuned MA-LMM; returns its weights."""
    state = lavis_names(model.state_dict())
    frozen = ("visual_encoder.", "llm_model.")
    tuned = {n: t.clone() for n, t in state.items() if not n.startswith(frozen)}
    generator = torch.Generator().manual_seed(seed)
    tuned["image_pe.weight"] = torch.randn(
        rows, model.config.vision_config.hidden_size, generator=generator
    )
    buffers = {
        "Qformer.bert.embeddings.position_ids": torch.arange(8)[None],
        "llm_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    torch.save(
        {"model": tuned | buffers, "optimizer": {"state": {}}, "config": {"run": {}}, "epoch": 3},
        path,
    )
    return tuned


def random_model(c: AdaCM2Config, seed: int = 5, dtype: torch.dtype = torch.float32):
    return oracle.instructblip(c, seed).to(dtype)
