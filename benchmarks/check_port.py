"""A checkpoint of full size through the converter: how long it takes, and how much memory.

Makes a random InstructBLIP-Vicuna-7B in Hugging Face's layout (7.9 billion parameters, bfloat16,
15.8 GB), converts and verifies it with ``python -m adacm2_jax.port import --verify``, and then
reads a video of 8 frames with the converted ViT-g and Q-Former. Needs 32 GB of disk and PyTorch.
"""

import argparse
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import numpy as np

ROWS = 32064  # of the language model's tables: the published file's
SHARD_BYTES = 2 << 30


def make(directory: pathlib.Path) -> None:
    """The checkpoint, tensor by tensor, with values of the size that trained ones have."""
    import ml_dtypes
    import safetensors.numpy

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    from adacm2_jax.config import LlamaConfig, instructblip_vicuna_7b
    from adacm2_jax.models.params import param_shapes
    from adacm2_jax.port.formats import to_hugging_face_config
    from adacm2_jax.port.names import hf_table
    from adacm2_jax.port.rules import pieces_of

    config = instructblip_vicuna_7b(llm=LlamaConfig(vocab_size=ROWS))
    ours = param_shapes(config)
    table = hf_table(config)
    shapes = {
        piece.name: piece.whole_shape
        for rule in table.rules
        if rule.ours != "temporal_embed"
        for piece in pieces_of(rule, ours[rule.ours])
    }
    directory.mkdir(parents=True)
    settings = to_hugging_face_config(config, "bfloat16", 32001)
    (directory / "config.json").write_text(settings.to_json_string())
    write_tokenizers(directory)

    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        safetensors.numpy.save_file(shard, directory / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        if len(shape) == 1 and name.endswith("weight"):
            values += 1
        if name in table.zeros:
            which, parts = table.zeros[name]
            values.reshape(parts, -1)[which] = 0
        shard[name] = values.astype(ml_dtypes.bfloat16)
        if sum(array.nbytes for array in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizers(directory: pathlib.Path) -> None:
    """As many pieces and words as the real ones have; which they are does not matter here."""
    pieces = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>"])}
    pieces |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    pieces |= {f"▁{i}": i for i in range(len(pieces), 32000)}
    model = {"type": "BPE", "vocab": pieces, "merges": []}
    (directory / "tokenizer.json").write_text(json.dumps({"model": model}))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"w{i}" for i in range(len(words), 30522)]
    (directory / "qformer_tokenizer").mkdir()
    (directory / "qformer_tokenizer" / "vocab.txt").write_text("\n".join(words) + "\n")


def convert(source: pathlib.Path, target: pathlib.Path) -> None:
    """In a process of its own, whose peak memory is then that of the children."""
    command = [sys.executable, "-m", "adacm2_jax.port", "import"]
    for options in ([], ["--verify"]):
        shutil.rmtree(target, ignore_errors=True)  # beside it the disk need not hold another
        start = time.perf_counter()
        subprocess.run(
            [*command, "--src", source, "--dst", target, *options],
            check=True,
            cwd=pathlib.Path(__file__).resolve().parent.parent,
        )
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        seconds = time.perf_counter() - start
        print(f"import {' '.join(options)}: {seconds:.0f} s, peak {peak:.2f} GB", flush=True)


def answer(weights: pathlib.Path, frames: int, dtype: str) -> None:
    """Eight frames through ViT-g and Q-Former to the 32 visual tokens."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    from flax import traverse_util

    from adacm2_jax.models.adacm2 import AdaCM2, Question, call, init_state
    from adacm2_jax.port.store import open_ours

    config, stored = open_ours(weights)
    config = dataclasses.replace(config, dtype=dtype)
    params = traverse_util.unflatten_dict(
        {p: jnp.asarray(stored.read(p), dtype) for p in stored.shapes if not p.startswith("llm/")}
        | {"temporal_embed": jnp.zeros((config.temporal_positions, config.vision.width), dtype)},
        sep="/",
    )
    size = config.vision.image_size
    video = np.random.default_rng(0).integers(0, 255, (1, frames, size, size, 3), dtype=np.uint8)
    ids, mask = np.full((1, 12), 7, np.int32), np.ones((1, 12), bool)
    question = Question(ids, mask, ids, mask)
    model = AdaCM2(config)
    encode = jax.jit(lambda params, frames: call(model, params, "encode_frames", frames))
    start = time.perf_counter()
    features = jnp.concatenate([encode(params, video[:, i : i + 1]) for i in range(frames)], 1)
    state = init_state(config, jnp.full((1,), frames, jnp.int32))
    stream = jax.jit(lambda params, *args: call(model, params, "read", *args))
    state = stream(params, features, np.ones((1, frames), bool), question, state)
    tokens = np.asarray(call(model, params, "visual_tokens", state.queries), np.float32)
    seconds = time.perf_counter() - start
    assert tokens.shape == (1, config.qformer.num_queries, config.llm.width)
    assert np.isfinite(tokens).all() and tokens.std() > 0
    kept = state.memory.length[:, 0].tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{frames} frames to {tokens.shape[1]} visual tokens in {dtype}: {seconds:.0f} s with "
        f"compilation, tokens kept by layer {kept}, peak {peak:.1f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=pathlib.Path, default=pathlib.Path("runs/full-size"))
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    source, weights = args.dir / "instructblip", args.dir / "weights"
    if not (source / "model.safetensors.index.json").exists():
        make(source)
    source, weights = source.resolve(), weights.resolve()
    convert(source, weights)
    answer(weights, args.frames, args.dtype)


if __name__ == "__main__":
    main()
