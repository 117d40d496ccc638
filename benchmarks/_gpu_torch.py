"""Section ``torch`` of gpu.py: PyTorch with transformers on the same card.

The ViT is transformers' ``InstructBlipVisionModel`` with scaled-dot-product attention; Q-Former and
memory are ``_torch_qformer.py`` in its fused form, frame by frame; the language model is
transformers' ``LlamaForCausalLM`` with ``generate``; MA-LMM's banks are ``_torch_banks.py``. All in
bfloat16 with random weights, eager and by ``torch.compile``. JAX computes nothing here but shapes.
"""

import dataclasses
import functools
import os
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the card is PyTorch's

import flax.linen as nn
import jax
import numpy as np
import torch
import transformers

from adacm2_jax.config import AdaCM2Config, MemoryConfig
from adacm2_jax.memory.policies import plan_for
from adacm2_jax.models.adacm2 import init_params
from benchmarks import _gpu
from benchmarks._gpu import Rows, Size, answering
from benchmarks._torch_banks import BankedQFormer
from benchmarks._torch_qformer import StreamingQFormer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16
#: As MA-LMM has it for LVU.
BANK_FRAMES = 20


def wait(_: Any) -> None:
    """Until the card has done all that it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


seconds_of = functools.partial(_gpu.seconds_of, wait=wait)


def vision_model(config: AdaCM2Config) -> torch.nn.Module:
    """transformers' ViT with our sizes."""
    v = config.vision
    about = transformers.InstructBlipVisionConfig(
        hidden_size=v.width,
        intermediate_size=v.mlp_width,
        num_hidden_layers=v.depth,
        num_attention_heads=v.num_heads,
        image_size=v.image_size,
        patch_size=v.patch_size,
        attn_implementation="sdpa",
    )
    with torch.device(DEVICE):
        return transformers.InstructBlipVisionModel(about).to(DTYPE).eval()


def qformer(config: AdaCM2Config, words: int) -> torch.nn.Module:
    """Q-Former and memory of one video, with random weights; for ``merge`` with MA-LMM's banks."""
    shapes = nn.unbox(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)
        return values + np.float32(path[-1].key == "scale")

    # MA-LMM's has the text padded to its places; here every row is real.
    ids = rng.integers(1, config.qformer.vocab_size, words)
    needed = {name: shapes[name] for name in ("ln_vision", "temporal_embed", "qformer")}
    params = jax.tree_util.tree_map_with_path(draw, needed)
    if config.memory.policy == "merge":
        return BankedQFormer(params, config, ids).to(DEVICE, DTYPE).eval()
    plan = plan_for(config)

    def counts(live: int) -> tuple[int, int]:
        return int(plan.recent[0, live]), int(plan.older[0, live])

    return StreamingQFormer(params, config, counts, ids, fused=True).to(DEVICE, DTYPE).eval()


def language_model(config: AdaCM2Config) -> torch.nn.Module:
    """transformers' LLaMA with our sizes."""
    c = config.llm
    about = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=c.mlp_width,
        num_hidden_layers=c.depth,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_positions,
        attn_implementation="sdpa",
        dtype=DTYPE,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)  # never all in float32
    try:
        with torch.device(DEVICE):
            return transformers.LlamaForCausalLM(about).eval()
    finally:
        torch.set_default_dtype(before)


def section_torch(rows: Rows, size: Size) -> None:
    """Frames and tokens a second, as ``stream`` and ``decode`` have them."""
    about = dict(
        card=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu", torch=torch.__version__
    )
    config = size.config()
    with torch.inference_mode():
        _frames(rows, size, config, about)
        _tokens(rows, size, config, about)


def _frames(rows: Rows, size: Size, config: AdaCM2Config, about: dict) -> None:
    vit, reader = vision_model(config), qformer(config, size.words)
    for index in range(4 * size.chunk):  # until the memory has its length
        reader(_features(config, 1)[0], index)
    banks = MemoryConfig(policy="merge", bank_frames=BANK_FRAMES)
    banked = qformer(dataclasses.replace(config, memory=banks), size.words)
    for index in range(BANK_FRAMES + 2):
        banked(_features(config, 1)[0], index)
    ways = {"eager": (vit, reader)}
    if not size.tiny:
        ways["compiled"] = torch.compile(vit, dynamic=False), torch.compile(reader, dynamic=False)
        ways["compiled"][0](_images(config, size.chunk))
        ways["compiled"][1](_features(config, 1)[0], 200)
    for way, (encode, read) in ways.items():
        _vit(rows, size, config, way, encode, size.chunk, about)
        _together(rows, size, config, "eq8", way, encode, read, about)
    _together(rows, size, config, f"MA-LMM's banks of {BANK_FRAMES}", "eager", vit, banked, about)
    for way, (encode, _) in ways.items():
        _vit(rows, size, config, way, encode, 8 * size.chunk, about)


def _images(config: AdaCM2Config, count: int) -> torch.Tensor:
    side = config.vision.image_size
    return torch.randn(count, 3, side, side, device=DEVICE, dtype=DTYPE)


def _features(config: AdaCM2Config, count: int) -> torch.Tensor:
    shape = count, config.vision.tokens_per_frame, config.vision.width
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def _vit(rows, size, config, way, encode, images, about) -> None:
    if rows.late(name := f"ViT, {images} images, {way}"):
        return
    batch, begun = _images(config, images), time.perf_counter()
    seconds, spread = seconds_of(lambda: encode(batch), size.least)
    taken = time.perf_counter() - begun
    rows.add(name, **about, frames_a_second=images / seconds, spread=spread, measured_in=taken)


def _together(rows, size, config, what, way, encode, read, about) -> None:
    """One video, one question: a chunk by the ViT, then frame by frame."""
    chunk = size.chunk
    if rows.late(name := f"{what}, 1 videos, 1 questions, chunk {chunk}, {way}"):
        return
    batch, features = _images(config, chunk), _features(config, chunk)
    begun = time.perf_counter()

    def reading() -> None:
        for frame in features:
            read(frame, 200)

    def together() -> None:
        for frame in encode(batch).last_hidden_state:
            read(frame, 200)

    alone, _ = seconds_of(reading, size.least)
    both, spread = seconds_of(together, size.least)
    rows.add(
        name,
        **about,
        frames_a_second=chunk / both,
        without_vit_ms_a_frame=alone / chunk * 1e3,
        spread=spread,
        measured_in=time.perf_counter() - begun,
    )


def _tokens(rows: Rows, size: Size, config: AdaCM2Config, about: dict) -> None:
    model = language_model(config)
    places = config.qformer.num_queries + size.words
    for batch, beams, cache in ((1, 1, None), (1, 5, None), (8, 1, None), (1, 1, "static")):
        name = f"{batch} rows, {beams} beams, {'compiled' if cache else 'eager'}"
        if rows.late(name):
            continue
        if cache and size.tiny:
            continue
        prompt = torch.randn(batch, places, config.llm.width, device=DEVICE, dtype=DTYPE)
        mask = torch.ones(batch, places, dtype=torch.long, device=DEVICE)

        def seconds(tokens, prompt=prompt, mask=mask, beams=beams, cache=cache):
            def call():
                return model.generate(
                    inputs_embeds=prompt,
                    attention_mask=mask,
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    num_beams=beams,
                    do_sample=False,
                    pad_token_id=0,
                    cache_implementation=cache,
                )

            return seconds_of(call, size.least, windows=3)

        rows.add(name, **about, **answering(seconds, batch, size.new_tokens))
