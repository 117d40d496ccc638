"""Hugging Face models of the sizes of our configurations, with random weights that hide nothing.

Works with transformers 4.57 and 5: what the two call differently is settled here.
"""

import contextlib
from collections.abc import Iterable, Iterator

import jax
import numpy as np
import torch
import transformers

from adacm2_jax.config import AdaCM2Config, LlamaConfig
from adacm2_jax.models.vit import PIXEL_MEAN, PIXEL_STD

#: Largest error allowed, relative to the largest magnitude in the oracle's tensor: some 80 times
#: the spacing of float32, for sums of up to 6144 products in a few layers, rounded on both sides.
TOLERANCE = 1e-5
#: Parameters that are looked up or added, not multiplied: drawn with variance one.
TABLES = (
    "class_embedding",
    "position_embedding",
    "embeddings.weight",
    "embed_tokens.weight",
    "query_tokens",
)


def instructblip(config: AdaCM2Config, seed: int, kind: str = "InstructBlip"):
    """``InstructBlipForConditionalGeneration``, or the video model with kind ``InstructBlipVideo``.

    The last row of the LLM's vocabulary is the image token.
    """
    vision, qformer = config.vision, config.qformer
    sizes = dict(
        vision_config=dict(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_size=vision.width,
            num_hidden_layers=vision.depth,
            num_attention_heads=vision.num_heads,
            intermediate_size=vision.mlp_width,
            layer_norm_eps=vision.layer_norm_eps,
        ),
        qformer_config=dict(
            vocab_size=qformer.vocab_size,
            hidden_size=qformer.width,
            num_hidden_layers=qformer.depth,
            num_attention_heads=qformer.num_heads,
            intermediate_size=qformer.mlp_width,
            max_position_embeddings=qformer.max_positions,
            layer_norm_eps=qformer.layer_norm_eps,
            cross_attention_frequency=qformer.cross_attention_every,
        ),
        text_config=llama_config(config.llm).to_dict(),
        num_query_tokens=qformer.num_queries,
    )
    image_token = config.llm.vocab_size - 1
    # The image model's field goes by another name in the video model.
    field = "video_token_index" if kind == "InstructBlipVideo" else "image_token_index"
    settings = getattr(transformers, f"{kind}Config")(**sizes, **{field: image_token})
    model = getattr(transformers, f"{kind}ForConditionalGeneration")
    model = model._from_config(settings, attn_implementation="eager")
    model.vision_model.post_layernorm.eps = config.ln_vision_eps
    return randomised(model, seed)


def llama_config(config: LlamaConfig) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        intermediate_size=config.mlp_width,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,  # transformers 5 moves it to rope_parameters
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tie_embeddings,
    )


def llama(config: LlamaConfig, seed: int) -> transformers.LlamaForCausalLM:
    model = transformers.LlamaForCausalLM._from_config(
        llama_config(config), attn_implementation="eager"
    )
    return randomised(model, seed)


@torch.no_grad()
def randomised(model: torch.nn.Module, seed: int):
    """The model for inference in float32, with every parameter drawn anew.

    Fresh models have zero biases, unit scales and so small weights that attention is almost
    uniform: an error in any of them would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(generator=generator)
        if name.endswith("qkv.bias"):
            parameter.mul_(0.3).view(3, -1)[1] = 0  # EVA has no bias on the keys
        elif name.endswith("bias"):
            parameter.mul_(0.3)
        elif parameter.ndim == 1:
            parameter.mul_(0.3).add_(1)
        elif not name.endswith(TABLES):
            parameter.mul_(parameter[0].numel() ** -0.5)
    return model.eval().float().requires_grad_(False)


def pixels(frames: np.ndarray) -> torch.Tensor:
    """uint8[…, height, width, 3] as an image processor leaves it: float32[…, 3, height, width]."""
    scaled = frames.astype(np.float32) / 255
    normal = (scaled - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
    return torch.from_numpy(np.moveaxis(normal, -1, -3).copy())


def visual_tokens(model, **inputs) -> torch.Tensor:
    """The projected tokens of an image or a video."""
    kind = "video" if hasattr(model, "get_video_features") else "image"
    output = getattr(model, f"get_{kind}_features")(**inputs)
    return getattr(output, "pooler_output", output)  # 4.57 returns the tokens themselves


def first(output) -> torch.Tensor:
    """What a layer computes: all of its output in transformers 5, the first of a tuple in 4.57."""
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def outputs_of(layers: Iterable[torch.nn.Module]) -> Iterator[list[torch.Tensor]]:
    """What these layers compute, call by call, while the context is open."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: found.append(first(output)))
        for layer in layers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def qformer(model, ids, mask, features):
    """Query rows; the rows after every layer; the probabilities of every layer that reads."""
    batch, num_queries = len(features), model.query_tokens.shape[1]
    mask = np.concatenate([np.ones((batch, num_queries), bool), mask], axis=1)
    with outputs_of(model.qformer.encoder.layer) as layers:
        output = model.qformer(
            input_ids=torch.from_numpy(ids).long() if ids.shape[1] else None,
            attention_mask=torch.from_numpy(mask).long(),
            query_embeds=model.query_tokens.expand(batch, -1, -1),
            encoder_hidden_states=torch.as_tensor(features),
            output_attentions=True,
        )
    return output.last_hidden_state[:, :num_queries], layers, output.cross_attentions


def error(ours: jax.Array, oracle: torch.Tensor) -> float:
    """The largest error, relative to the largest magnitude of the oracle."""
    ours, theirs = np.asarray(ours), oracle.detach().numpy()
    assert ours.shape == theirs.shape, f"shape {ours.shape}, the oracle has {theirs.shape}"
    assert ours.dtype == theirs.dtype == np.float32
    assert np.isfinite(theirs).all()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def assert_close(ours: jax.Array, oracle: torch.Tensor) -> None:
    found = error(ours, oracle)
    assert found <= TOLERANCE, f"relative error {found:.1e}"
