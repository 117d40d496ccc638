"""The vision transformer against Hugging Face's, every token of it."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from adacm2_jax.config import VisionConfig, tiny
from adacm2_jax.models.layers import LayerNorm
from adacm2_jax.models.vit import VisionTransformer
from tests.parity import names, oracle

SIZES = {
    "tiny": tiny().vision,
    "odd": VisionConfig(image_size=24, patch_size=8, width=60, depth=2, num_heads=5, mlp_width=100),
}


def build(vision: VisionConfig, seed: int, **fields):
    config = tiny(vision=vision, **fields)
    model = oracle.instructblip(config, seed)
    return config, model, names.instructblip(model.state_dict(), config)


def random_pixels(vision: VisionConfig, batch: int) -> np.ndarray:
    size = vision.image_size
    return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)


def run(vision: VisionConfig, params, x: np.ndarray) -> jax.Array:
    return jax.jit(VisionTransformer(vision).apply)({"params": params["vision"]}, x)


def tokens_before_norm(model, x: np.ndarray) -> torch.Tensor:
    embedded = model.vision_model.embeddings(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    return model.vision_model.encoder(embedded).last_hidden_state


@pytest.mark.parametrize("size", SIZES)
def test_every_token_equals_the_oracle(size):
    vision = SIZES[size]
    _, model, params = build(vision, seed=1)
    x = random_pixels(vision, batch=2)
    ours = run(vision, params, x)
    assert ours.shape == (len(x), vision.tokens_per_frame, vision.width)
    oracle.assert_close(ours, tokens_before_norm(model, x))


def test_blocks_use_their_own_epsilon():
    """With a tiny residual stream, where epsilon counts, and one that is not the default."""
    vision = dataclasses.replace(SIZES["tiny"], layer_norm_eps=1e-3)
    _, model, _ = build(vision, seed=2)
    shrink(model)
    params = names.instructblip(model.state_dict(), tiny(vision=vision))
    x = random_pixels(vision, batch=1)
    theirs = tokens_before_norm(model, x)
    oracle.assert_close(run(vision, params, x), theirs)
    assert oracle.error(run(SIZES["tiny"], params, x), theirs) > 100 * oracle.TOLERANCE


@pytest.mark.parametrize(("epsilon", "other"), [(1e-6, 1e-5), (1e-5, 1e-6)])
def test_ln_vision_has_the_epsilon_of_its_checkpoint(epsilon, other):
    """1e-6 in Hugging Face's form, 1e-5 in LAVIS's; where the tokens are small the two differ."""
    config, model, _ = build(SIZES["tiny"], seed=3, ln_vision_eps=epsilon)
    shrink(model)
    params = names.instructblip(model.state_dict(), config)
    x = random_pixels(config.vision, batch=2)
    tokens = run(config.vision, params, x)
    image = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    theirs = model.vision_model(image).last_hidden_state

    def normalised(epsilon):
        return LayerNorm(epsilon, "vision").apply({"params": params["ln_vision"]}, tokens)

    oracle.assert_close(normalised(config.ln_vision_eps), theirs)
    assert oracle.error(normalised(other), theirs) > 100 * oracle.TOLERANCE


@torch.no_grad()
def shrink(model) -> None:
    """Makes what is added to the residual stream a hundred times smaller."""
    vision = model.vision_model
    for parameter in vision.embeddings.parameters():
        parameter.mul_(0.01)
    for layer in vision.encoder.layers:
        for module in (layer.self_attn.projection, layer.mlp.fc2):
            for parameter in module.parameters():
                parameter.mul_(0.01)
