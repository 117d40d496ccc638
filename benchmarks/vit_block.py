"""One block of ViT-g/14 at full size against the same block in eager PyTorch.

1408 wide, 16 heads, 257 tokens a frame, float32, random weights (the same on both sides). Each side
is timed a second time with its matrix products alone, which tells how much of the time the rest
takes: layer norms, softmax, GELU, biases, residuals and moving data.
"""

import argparse

import _paired  # before JAX: it sets the number of threads
import _report
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from _torch_qformer import layer_norm, linear
from torch.nn import functional as F

from adacm2_jax.config import VisionConfig
from adacm2_jax.models.vit import Block

BATCHES = (1, 4, 8)
# Float32 keeps 2⁻²⁴ of a value; the rounding errors of the block's chains of sums, over 1408 and
# 6144 terms, grow like the square root of their number; values reach about 8.
TOLERANCE = 2.0**-24 * (1408 + 6144) ** 0.5 * 8


class TorchBlock(torch.nn.Module):
    """Fused projections and PyTorch's own fused attention."""

    def __init__(self, params: dict, config: VisionConfig):
        super().__init__()
        self.heads = config.num_heads
        key = params["key"] | dict(bias=np.zeros(config.width, np.float32))
        self.qkv = linear(params["query"], key, params["value"])
        self.out = linear(params["out"], num_inputs=2)
        self.up, self.down = linear(params["mlp"]["up"]), linear(params["mlp"]["down"])
        self.norm1 = layer_norm(params["norm1"], config.layer_norm_eps)
        self.norm2 = layer_norm(params["norm2"], config.layer_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def random_params(config: VisionConfig, x: jax.Array) -> dict:
    shapes = nn.unbox(jax.eval_shape(Block(config).init, jax.random.key(0), x, None))["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)
        return values + np.float32(path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(draw, shapes)


def products(config: VisionConfig, batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Operands of the block's matrix products, in the layouts in which both sides find them."""
    rows, width, heads = batch * config.tokens_per_frame, config.width, config.num_heads
    tokens, head_dim = config.tokens_per_frame, width // heads
    rng = np.random.default_rng(2)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    return [
        (draw(rows, width), draw(width, 3 * width)),
        (draw(batch * heads, tokens, head_dim), draw(batch * heads, head_dim, tokens)),
        (draw(batch * heads, tokens, tokens), draw(batch * heads, tokens, head_dim)),
        (draw(rows, width), draw(width, width)),
        (draw(rows, width), draw(width, config.mlp_width)),
        (draw(rows, config.mlp_width), draw(config.mlp_width, width)),
    ]


def run(config: VisionConfig, batch: int, rounds: int) -> dict:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((batch, config.tokens_per_frame, config.width), np.float32)
    x, y = jnp.asarray(values), torch.from_numpy(values)
    params = random_params(config, x)
    weights = jax.tree.map(jnp.asarray, params)
    block = jax.jit(lambda weights, x: Block(config).apply({"params": weights}, x, None)[0])
    module = TorchBlock(params, config).eval()

    def ours():
        return block(weights, x).block_until_ready()

    @torch.inference_mode()
    def theirs():
        return module(y)

    difference = np.abs(np.asarray(ours()) - theirs().numpy()).max()
    assert difference < TOLERANCE, f"the two sides differ by {difference:.1e}"
    result = _paired.paired(ours, theirs, rounds)

    operands = products(config, batch)
    jax_operands = jax.tree.map(jnp.asarray, operands)
    multiply = jax.jit(lambda pairs: [a @ b for a, b in pairs])
    torch_operands = [tuple(map(torch.from_numpy, pair)) for pair in operands]

    @torch.inference_mode()
    def theirs_alone():
        return [a @ b for a, b in torch_operands]

    alone = _paired.paired(
        lambda: jax.block_until_ready(multiply(jax_operands)), theirs_alone, rounds
    )
    gflop = sum(2 * a.size * b.shape[-1] for a, b in operands) / 1e9
    result |= dict(batch=batch, gflop=gflop / batch, difference=float(difference))
    result |= dict(ours_products=alone["ours"], theirs_products=alone["theirs"])
    for name in ("ours", "theirs", "ours_products", "theirs_products"):
        result[name] /= batch
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=96, help="timed at each batch size")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()

    results = _paired.header()
    print(
        "frames  GFLOP  ours ms (products)  torch ms (products)  ratio (quartiles)  share of peak"
    )
    for batch in BATCHES:
        row = run(VisionConfig(), batch, rounds=max(8, args.frames // batch))
        results["rows"].append(row)
        milliseconds = {name: 1e3 * value for name, value in row.items()}
        print(
            f"{batch:6} {row['gflop']:6.1f} {milliseconds['ours']:8.1f} "
            f"({milliseconds['ours_products']:.1f}) {milliseconds['theirs']:14.1f} "
            f"({milliseconds['theirs_products']:.1f}) {_report.ratio(row):>22}"
            f" {_paired.shares(row, results['peak'])}",
            flush=True,
        )
    _report.write_json(args.json, results)


if __name__ == "__main__":
    main()
