"""What the program for an H100 consists of, by XLA's compiler; no GPU is needed.

    python benchmarks/check_gpu_program.py

Compiles reading for one H100 at full size in bfloat16, one video, a chunk of 16 frames, and counts
in the optimised program: the kernels that run for every frame in every layer of the memory, as XLA
makes them and as ``model.fused_memory`` does; those of a ViT block, and the largest array of a ViT
block, with plain and with fused attention (``model.fused_vision``), and with biases and GELU in the
products (``model.fused_epilogues``). Products are those of cuBLASLt everywhere: on a card XLA
chooses by timing, without epilogues among its own kernels, too. Exits with 1 if fused attention
leaves an array of all logits, if a GELU stands outside of its product, or if there are more kernels
than there were. Needs jax[cuda12].
"""

import math
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from adacm2_jax.config import AdaCM2Config, instructblip_vicuna_7b, memory_preset
from adacm2_jax.inference.steps import encoder, read
from adacm2_jax.models.adacm2 import AdaCM2, Question, init_state
from adacm2_jax.models.params import abstract_params, unstacked
from adacm2_jax.plan.topology import parse_topology, topology_devices
from adacm2_jax.sharding import make_mesh, replicated
from benchmarks import _hlo

CHUNK, WORDS = 16, 32
#: Kernels a frame and layer of the memory, by preset and whether they are ours: what is there now,
#: so that it does not grow.
MOST_KERNELS = {("eq8", False): 28, ("eq6", False): 28, ("eq8", True): 3, ("eq6", True): 3}
#: Of the ViT a block, by way, and of all that reads a chunk, by our kernels.
MOST_A_BLOCK, MOST_A_CHUNK = {"fused": 10.2, "epilogues": 9.2}, 578
_GROUPS = (("temporal_embed", 1.0), (".*", None))


def program(config: AdaCM2Config, step: str, apart: bool = False, chunk: int = CHUNK) -> str:
    """The text of ``encode`` or ``read``, optimised for one H100; ``apart``: for layers with
    parameters of their own, as a model that is asked has them."""
    (device,) = topology_devices(parse_topology("h100"))
    mesh = make_mesh((1, 1), [device])
    model, place = AdaCM2(config), replicated(mesh)

    def shape(dtype, *dims):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

    params = abstract_params(config, _GROUPS, mesh)
    params = unstacked(params) if apart else params
    side = config.vision.image_size
    if step == "encode":
        arguments = params, shape(jnp.uint8, 1, chunk, side, side, 3)
        function = encoder(config)
    else:
        ids, mask = shape(jnp.int32, 1, WORDS), shape(bool, 1, WORDS)
        state = jax.tree.map(
            lambda leaf: shape(leaf.dtype, *leaf.shape),
            jax.eval_shape(lambda: init_state(config, jnp.zeros(1, jnp.int32))),
        )
        tokens = config.vision.tokens_per_frame, config.vision.width
        features = shape(config.feature_dtype, 1, chunk, *tokens)
        valid, question = shape(bool, 1, chunk), Question(ids, mask, ids, mask)
        arguments = params, features, valid, question, state
        function = read
    with jax.set_mesh(mesh):
        traced = function.trace(model, *arguments)
        lowered = traced.lower(lowering_platforms=("cuda",))
    options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    return lowered.compile(compiler_options=options).as_text()


def largest(lines: list[str]) -> tuple[int, str]:
    """Bytes and shape of the largest array that an instruction of a loop's body makes.

    What it is handed on from outside (tuples, parts of them) does not count.
    """
    sizes = {
        "f32": 4,
        "bf16": 2,
        "f16": 2,
        "s32": 4,
        "u32": 4,
        "pred": 1,
        "u8": 1,
    }  # s8 is room of a library
    found = (0, "")
    for line in lines:
        made = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(", line)
        if not made or made[2] not in _hlo.KERNELS:
            continue
        for kind, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]+)\]", made[1]):
            shape = [int(size) for size in dims.split(",")]
            found = max(found, (sizes.get(kind, 0) * math.prod(shape), f"{kind}[{dims}]"))
    return found


def main() -> int:
    failures = []
    print("| program | way | kernels in the loop | largest array made there | MiB |")
    print("|---|---|---|---|---|")
    for fused in (False, True):
        config = instructblip_vicuna_7b(dtype="bfloat16", fused_vision=fused)
        body = _hlo.loop_body(program(config, "encode"), _hlo.FRAME_LOOPS["ViT blocks"])
        size, shape = largest(body)
        way = "fused" if fused else "plain"
        count = len(_hlo.kernels(body))
        print(f"| ViT block | {way} | {count} | {shape} | {size / 2**20:.0f} |", flush=True)
        tokens = config.vision.tokens_per_frame
        padded = range(tokens, tokens + 8)
        squares = [f"{a},{b}]" for a in padded for b in padded]
        if fused and any("f32[" in line and square in line for line in body for square in squares):
            failures.append("fused attention leaves an array of all logits in float32")
    for way in ("fused", "epilogues"):
        config = instructblip_vicuna_7b(dtype="bfloat16", fused_epilogues=way == "epilogues")
        lines = _hlo.entry(program(config, "encode", apart=True))
        size, shape = largest(lines)
        count = len(_hlo.kernels(lines)) / config.vision.depth
        print(f"| ViT, by blocks | {way}, apart | {count:.1f} | {shape} | {size / 2**20:.0f} |")
        if round(count, 1) > MOST_A_BLOCK[way]:
            failures.append(f"ViT, {way}: {count:.1f} kernels a block, at most {MOST_A_BLOCK[way]}")
        inside = sum('"epilogue":"BIAS_GELU"' in line for line in lines)
        if config.fused_epilogues and inside != config.vision.depth:
            failures.append(f"{inside} of {config.vision.depth} GELUs are within a product")
    for (preset, ours), most in MOST_KERNELS.items():
        config = instructblip_vicuna_7b(
            dtype="bfloat16", memory=memory_preset(preset), fused_memory=ours
        )
        if ours:  # no loop: what a frame more adds to the program
            lines, fewer = (
                _hlo.entry(program(config, "read", True, n)) for n in (CHUNK, CHUNK // 2)
            )
            more = len(_hlo.kernels(lines)) - len(_hlo.kernels(fewer))
            count = more / (CHUNK - CHUNK // 2) / config.qformer.num_cross_layers
        else:
            lines = _hlo.loop_body(program(config, "read"), _hlo.FRAME_LOOPS["frames"])
            count = len(_hlo.kernels(lines))
        size, shape = largest(lines)
        if ours:
            whole = len(_hlo.kernels(lines))
            print(f"| reading a chunk, {preset} | fused, apart | {whole} | | |")
            if whole > MOST_A_CHUNK:
                failures.append(f"{preset}: a chunk takes {whole} kernels, at most {MOST_A_CHUNK}")
        way = "fused" if ours else "plain"
        print(
            f"| memory, {preset} | {way} | {count:g} | {shape} | {size / 2**20:.1f} |", flush=True
        )
        if count > most:
            failures.append(f"memory, {preset}: {count} kernels a frame and layer, at most {most}")
    for failure in failures:
        print(f"does not hold: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
