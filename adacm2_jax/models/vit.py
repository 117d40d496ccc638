"""EVA-CLIP ViT-g/14 as LAVIS uses it (lavis/models/eva_vit.py).

Pre-norm blocks with LayerNorm epsilon 1e-6, exact GELU, no bias on the attention keys, no layer
scale; no norm, pooling or head after the last block: all tokens are returned, CLS first.

Matrix products are computed in the dtype of the pixels, the residual stream in float32: as LAVIS
under autocast, where what 39 blocks add is not rounded away in half precision.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from adacm2_jax.config import VisionConfig
from adacm2_jax.models.cuda import has_cuda
from adacm2_jax.models.fused_norm import add_and_norm
from adacm2_jax.models.layers import (
    ONES,
    ZEROS,
    Dense,
    Mlp,
    attention,
    embedding,
    fused_attention,
    layer_norm,
    param,
    rematerialised,
    wide,
)

#: CLIP's pixel statistics, for values in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(images: jax.Array) -> jax.Array:
    """uint8[…, 3], RGB, as the ViT wants its pixels: float32, by CLIP's statistics."""
    pixels = images.astype(jnp.float32) / 255
    return (pixels - jnp.asarray(PIXEL_MEAN)) / jnp.asarray(PIXEL_STD)


class Norm(nn.Module):
    """Adds to the residual stream and normalises it for the products that come next.

    ``fused``: see ``fused_norm.add_and_norm``.
    """

    epsilon: float
    dtype: Any
    fused: bool

    @nn.compact
    def __call__(self, x: jax.Array, added: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """float32[B, P, V] and what is added to it, if anything → the sum, and its norm."""
        scale = param(self, "scale", ONES, (x.shape[-1],), ("vision",))
        bias = param(self, "bias", ZEROS, (x.shape[-1],), ("vision",))
        if self.fused and added is not None:
            return add_and_norm(x, added, scale, bias, self.epsilon)
        x = x if added is None else x + added
        return x, layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


class Block(nn.Module):
    """A pre-norm block on float32[B, P, V], with matrix products in ``dtype``.

    Attributes:
      config: of the ViT.
      dtype: of the products.
      fused: for an NVIDIA GPU, by cuDNN's attention; of a block that ``adds_later``, by fewer
        kernels, too.
      fused_gelu: by ``layers.fused_gelu``.
      adds_later: what the block adds at its end is returned, for the next block to add.
    """

    config: VisionConfig
    dtype: Any = jnp.float32
    fused: bool = False
    fused_gelu: bool = False
    adds_later: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, added: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """The stream and what the block before has left to add, if anything."""
        c = self.config
        shape = (c.width, c.num_heads, c.width // c.num_heads)
        axes = ("vision", "heads", "head_dim")
        half = self.dtype in (jnp.bfloat16, jnp.float16)  # the kernels add up in float32
        by_library = self.fused and half and has_cuda()
        fewer = by_library and self.adds_later
        norm = functools.partial(Norm, c.layer_norm_eps, self.dtype, fewer)
        x, y = norm(name="norm1")(x, added)
        # Of products of the same rows XLA makes one, and for that puts their weights together, for
        # every chunk anew, and takes its result apart; of rows that only it cannot tell apart, not.
        rows = jax.lax.optimization_barrier((y, y, y)) if fewer else (y, y, y)
        query = Dense(shape, axes, flat=by_library, name="query")(rows[0])
        key = Dense(shape, axes, use_bias=False, name="key")(rows[1])
        value = Dense(shape, axes, flat=by_library, name="value")(rows[2])
        y = (fused_attention if self.fused else attention)(query, key, value)
        y = Dense(shape[1:] + shape[:1], axes[1:] + axes[:1], num_inputs=2, name="out")(y)
        x, y = norm(name="norm2")(x, y)
        y = Mlp(c.width, c.mlp_width, "vision", self.fused_gelu, name="mlp")(y)
        return (x, y) if self.adds_later else (x + y, None)


class VisionTransformer(nn.Module):
    """Frames to visual tokens.

    Called with ``[B, height, width, 3]`` normalised pixels, returns ``float32[B, P, V]``. At full
    size, for example, ``[8, 224, 224, 3] → [8, 257, 1408]``: 16 × 16 patches and CLS.
    """

    config: VisionConfig
    remat: bool = True
    fused: bool = False
    fused_gelu: bool = False

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c = self.config
        side, size = c.image_size // c.patch_size, c.patch_size
        batch = pixels.shape[0]
        patches = pixels.reshape(batch, side, size, side, size, 3).transpose(0, 1, 3, 2, 4, 5)
        embed = Dense(
            (size, size, 3, c.width), ("patch", "patch", "rgb", "vision"), 3, name="patch_embed"
        )
        x = wide(embed(patches.reshape(batch, side * side, size, size, 3)))
        cls = param(self, "cls_token", embedding, (1, 1, c.width), ("one", "one", "vision"))
        cls = jnp.broadcast_to(cls.astype(x.dtype), (batch, 1, c.width))
        x = jnp.concatenate([cls, x], axis=1)
        positions = param(
            self,
            "pos_embed",
            embedding,
            (1, c.tokens_per_frame, c.width),
            ("one", "token", "vision"),
        )
        x = x + positions.astype(x.dtype)
        settings = c, pixels.dtype, self.fused, self.fused_gelu
        apart: Any = self.get_variable("params", "blocks")
        if isinstance(apart, tuple):  # see params.unstacked
            block, added = Block(*settings, adds_later=True, parent=None), None
            for own in apart:
                x, added = block.apply({"params": own}, x, added)
            return x + added
        blocks = nn.scan(
            rematerialised(Block, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return blocks(*settings, name="blocks")(x, None)[0]
