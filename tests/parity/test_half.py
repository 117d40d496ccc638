"""Half precision against PyTorch's: neither is exact, so both are measured against float32.

Two models: as LAVIS and MA-LMM evaluate (ViT under autocast, Q-Former in float32, LLM in half
precision), and as Hugging Face does, where everything is cast.
"""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adacm2_jax.config import tiny
from adacm2_jax.models.adacm2 import AdaCM2, Question, call, init_state
from tests.parity import names, oracle

CONFIG = tiny()
#: Largest relative error of one rounding: 8 and 11 significant bits.
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
#: Tensors that are rounded on the way through one branch (a norm's output, weights, queries and
#: keys, probabilities, attended values or hidden units, the branch's output), and branches a layer.
ROUNDINGS, BRANCHES = 6, 3
#: How much less exact than PyTorch ours may be: it rounds a product once more before a bias is
#: added, and these are two draws of the same errors.
AS_GOOD = 1.25


@pytest.fixture(scope="module")
def model():
    return oracle.instructblip(CONFIG, seed=15)


@pytest.fixture(scope="module")
def params(model):
    return names.instructblip(model.state_dict(), CONFIG)


def the_inputs() -> tuple[np.ndarray, Question]:
    rng = np.random.default_rng(16)
    size = CONFIG.vision.image_size
    frames = rng.integers(256, size=(8, 1, size, size, 3), dtype=np.uint8)
    ids = rng.integers(CONFIG.llm.vocab_size - 1, size=(8, 6)).astype(np.int32)
    return frames, Question(ids, np.ones_like(ids, bool), ids, np.ones_like(ids, bool))


def ours(config, params) -> dict[str, np.ndarray]:
    """Tokens of the ViT, query rows, visual tokens and logits, after one frame."""
    model = AdaCM2(config)
    frames, question = the_inputs()

    @jax.jit
    def run(params):
        features = call(model, params, "encode_frames", frames)
        state = init_state(config, jnp.ones(len(frames), jnp.int32))
        valid = jnp.ones(frames.shape[:2], bool)
        state = call(model, params, "read", features, valid, question, state)
        visual = call(model, params, "visual_tokens", state.queries)
        length = visual.shape[1] + question.llm_ids.shape[1]
        logits, _ = call(model, params, "prefill", state.queries, question, length)
        return dict(tokens=features[:, 0], queries=state.queries, visual=visual, logits=logits)

    return {name: np.asarray(value, np.float64) for name, value in run(params).items()}


def pytorchs(model, vision=None, language=None) -> dict[str, np.ndarray]:
    """The same of PyTorch; ``vision`` is the dtype of autocast, ``language`` that of the LLM."""
    frames, question = the_inputs()
    kind = model.qformer.embeddings.layernorm.weight.dtype
    pixels = oracle.pixels(frames[:, 0]).to(kind)
    ids = torch.from_numpy(question.llm_ids).long()
    tower, queries = model.vision_model, model.query_tokens.to(kind).expand(len(ids), -1, -1)
    with torch.autocast("cpu", vision or torch.float32, enabled=vision is not None):
        tokens = tower.encoder(tower.embeddings(pixels)).last_hidden_state
    with oracle.outputs_of([model.qformer.encoder.layer[-1]]) as rows:
        model.qformer(
            input_ids=ids,
            attention_mask=torch.ones(len(ids), queries.shape[1] + ids.shape[1]).long(),
            query_embeds=queries,
            encoder_hidden_states=tower.post_layernorm(tokens),
        )
    rows = rows[0][:, : queries.shape[1]]
    llm = copy.deepcopy(model.language_model).to(language or kind)
    words = llm.get_input_embeddings()(ids)
    visual = model.language_projection(rows).to(words.dtype)
    logits = llm(inputs_embeds=torch.cat([visual, words], dim=1)).logits[:, -1]
    found = dict(tokens=tokens, queries=rows, visual=visual, logits=logits)
    return {name: value.double().numpy() for name, value in found.items()}


def deviation(found: np.ndarray, exact: np.ndarray) -> float:
    """Root of the mean square error, relative to that of the values."""
    return float(np.sqrt(np.square(found - exact).mean() / np.square(exact).mean()))


def assert_as_exact(found: dict, theirs: dict, exact: dict, half: str) -> None:
    """As near to float32 as PyTorch, and within what roundings can do.

    Relative errors pass a product with random weights with their size unchanged. Those of different
    roundings are independent, so their squares add up, each at most a squared unit; a result is a
    sum of branches, so its error is at most that of all roundings before it together.
    """
    depth = dict(tokens=CONFIG.vision.depth, queries=CONFIG.vision.depth + CONFIG.qformer.depth)
    depth["visual"], depth["logits"] = depth["queries"] + 1, depth["queries"] + CONFIG.llm.depth + 1
    for name, values in found.items():
        error, other = deviation(values, exact[name]), deviation(theirs[name], exact[name])
        print(f"{half} {name}: {error / UNIT[half]:.2f} units, PyTorch {other / UNIT[half]:.2f}")
        assert error <= AS_GOOD * other, f"{name}: {error}, PyTorch {other}"
        assert error <= (depth[name] * BRANCHES * ROUNDINGS) ** 0.5 * UNIT[half], name


@pytest.mark.parametrize("half", UNIT)
def test_with_the_qformer_in_float32_it_is_as_exact_as_lavis(model, params, half):
    config = dataclasses.replace(CONFIG, dtype=half, qformer_dtype="float32")
    dtype = getattr(torch, half)
    theirs = pytorchs(model, vision=dtype, language=dtype)
    assert_as_exact(ours(config, params), theirs, pytorchs(model), half)


@pytest.mark.parametrize("half", UNIT)
def test_in_half_precision_throughout_it_is_as_exact_as_hugging_face(model, params, half):
    config = dataclasses.replace(CONFIG, dtype=half)
    theirs = pytorchs(copy.deepcopy(model).to(getattr(torch, half)))
    assert_as_exact(ours(config, params), theirs, pytorchs(model), half)
