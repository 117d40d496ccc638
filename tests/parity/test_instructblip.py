"""The whole model on one frame against InstructBLIP, and on more against InstructBlipVideo."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adacm2_jax.config import AdaCM2Config, MemoryConfig, QFormerConfig, VisionConfig, tiny
from adacm2_jax.models.adacm2 import AdaCM2, Question, init_params, init_state
from tests.parity import names, oracle

CONFIG = tiny()
#: All that a frame passes, at the widths of the published model, as LAVIS has it: 2 of 39 blocks, 4
#: of 12 layers. (Elsewhere ln_vision has the epsilon of Hugging Face's form.)
FULL_WIDTH = AdaCM2Config(
    vision=VisionConfig(depth=2),
    qformer=QFormerConfig(depth=4),
    llm=dataclasses.replace(CONFIG.llm, vocab_size=32001, max_positions=2048),
    ln_vision_eps=1e-5,
)


@pytest.fixture(scope="module")
def model():
    return oracle.instructblip(CONFIG, seed=10)


@pytest.fixture(scope="module")
def params(model):
    return names.instructblip(model.state_dict(), CONFIG)


def random_frames(config: AdaCM2Config, *shape: int) -> np.ndarray:
    size = config.vision.image_size
    rng = np.random.default_rng(4)
    return rng.integers(256, size=(*shape, size, size, 3), dtype=np.uint8)


def random_question(config: AdaCM2Config, prompt_width: int = 7) -> Question:
    """Two questions: the first fills its row, the second is padded as each network wants it."""
    rng = np.random.default_rng(5)
    words = rng.integers(config.qformer.vocab_size, size=(2, 6))
    # The last row of the LLM's vocabulary is the oracle's image token.
    prompt = rng.integers(config.llm.vocab_size - 1, size=(2, prompt_width))
    return Question(
        qformer_ids=words.astype(np.int32),
        qformer_mask=np.arange(6) < np.array([[6], [2]]),
        llm_ids=prompt.astype(np.int32),
        llm_mask=np.arange(prompt_width) >= np.array([[0], [prompt_width - 3]]),
    )


def read(config, params, frames, question):
    """The state after the frames of a fresh video, one compiled step a frame."""
    model = AdaCM2(config)

    @jax.jit
    def step(params, frame, state):
        features = model.apply({"params": params}, frame, method="encode_frames")
        valid = jnp.ones(frame.shape[:2], bool)
        return model.apply({"params": params}, features, valid, question, state, method="read")

    states = [init_state(config, jnp.full((len(frames),), frames.shape[1]))]
    for t in range(frames.shape[1]):
        states.append(step(params, frames[:, t : t + 1], states[-1]))
    return states[1:]


@pytest.fixture(scope="module")
def state(params):
    """After the one frame of two videos."""
    return read(CONFIG, params, random_frames(CONFIG, 2, 1), random_question(CONFIG))[0]


def run(config: AdaCM2Config, params, *arguments, method: str):
    """A method of the model, compiled; what is no array in ``arguments`` is static."""
    apply = functools.partial(AdaCM2(config).apply, method=method)
    static = [i for i, argument in enumerate(arguments, 1) if isinstance(argument, int)]
    return jax.jit(apply, static_argnums=static)({"params": params}, *arguments)


def image_inputs(frames, question) -> dict:
    """What the oracle is told about the frame and about the Q-Former's text."""
    return dict(
        pixel_values=oracle.pixels(frames),
        qformer_input_ids=torch.from_numpy(question.qformer_ids).long(),
        qformer_attention_mask=torch.from_numpy(question.qformer_mask).long(),
    )


def language_inputs(config: AdaCM2Config, ids: np.ndarray, mask: np.ndarray) -> dict:
    """What its language model is told: a place for every visual token, then the text."""
    count, image_token = config.qformer.num_queries, config.llm.vocab_size - 1
    ids = np.concatenate([np.full((len(ids), count), image_token), ids], axis=1)
    mask = torch.from_numpy(np.concatenate([np.ones((len(mask), count), bool), mask], axis=1))
    return dict(input_ids=torch.from_numpy(ids).long(), attention_mask=mask.long())


def with_positions(inputs: dict) -> dict:
    """Padding has no position of its own: so does ``generate`` count."""
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return inputs | dict(position_ids=positions)


def test_every_weight_has_its_place(params):
    fresh = nn.unbox(jax.eval_shape(lambda key: init_params(CONFIG, key), jax.random.key(0)))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, fresh)


def test_a_weight_without_counterpart_is_refused(model):
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"no counterpart for more\.weight"):
        names.instructblip(state | {"more.weight": torch.zeros(1)}, CONFIG)
    del state["language_projection.bias"]
    with pytest.raises(KeyError, match=r"language_projection\.bias"):
        names.instructblip(state, CONFIG)


def test_visual_tokens_of_one_frame_equal_the_oracle(model, params, state):
    frames, question = random_frames(CONFIG, 2, 1), random_question(CONFIG)
    expected = oracle.visual_tokens(model, **image_inputs(frames[:, 0], question))
    oracle.assert_close(run(CONFIG, params, state.queries, method="visual_tokens"), expected)


def test_prefill_and_decoding_equal_the_oracles_whole_sequence(model, params, state):
    """Left-padded prompts, and four more tokens one by one, on top of one frame."""
    frames, question, steps = random_frames(CONFIG, 2, 1), random_question(CONFIG), 4
    rng = np.random.default_rng(6)
    answer = rng.integers(CONFIG.llm.vocab_size - 1, size=(2, steps)).astype(np.int32)
    inputs = language_inputs(
        CONFIG,
        np.concatenate([question.llm_ids, answer], axis=1),
        np.concatenate([question.llm_mask, np.ones_like(answer, bool)], axis=1),
    )
    expected = model(**image_inputs(frames[:, 0], question), **with_positions(inputs))
    expected = expected.logits[:, -steps - 1 :]

    length = CONFIG.qformer.num_queries + question.llm_ids.shape[1] + steps
    logits, cache = run(CONFIG, params, state.queries, question, length, method="prefill")
    oracle.assert_close(logits, expected[:, 0])
    decode = jax.jit(functools.partial(AdaCM2(CONFIG).apply, method="decode"))
    for i in range(steps):
        logits, cache = decode({"params": params}, answer[:, i], cache)
        oracle.assert_close(logits, expected[:, i + 1])


def test_training_loss_equals_the_oracle(model, params, state):
    """Prompt, answer, then padding; the mean over the answers' tokens of both rows."""
    frames, question = random_frames(CONFIG, 2, 1), random_question(CONFIG, prompt_width=9)
    mask = np.arange(9) < np.array([[9], [6]])
    targets = mask & (np.arange(9) >= np.array([[5], [3]]))
    question = question.replace(llm_mask=mask)
    inputs = language_inputs(CONFIG, question.llm_ids, mask)
    labels = np.where(targets, question.llm_ids, -100)
    visual = CONFIG.qformer.num_queries
    labels = np.concatenate([np.full((2, visual), -100), labels], axis=1)
    expected = model(
        **image_inputs(frames[:, 0], question), **inputs, labels=torch.from_numpy(labels)
    )
    loss, share = run(CONFIG, params, state.queries, question, targets, method="answer_loss")
    oracle.assert_close(loss, expected.loss)
    predicted = expected.logits[:, visual - 1 : -1].argmax(-1).numpy()
    assert share == pytest.approx((predicted == question.llm_ids)[targets].mean())


def test_frames_with_an_empty_memory_equal_instructblip_video(model, params):
    """Ratios of zero forget everything after each frame: every frame is read by itself."""
    frames, question = random_frames(CONFIG, 2, 3), random_question(CONFIG)
    forgetful = MemoryConfig(recent_ratio="0", conserve_ratio="0")
    config = dataclasses.replace(CONFIG, memory=forgetful)
    states = read(config, params, frames, question)
    queries = jnp.concatenate([state.queries for state in states], axis=1)
    ours = run(CONFIG, params, queries, method="visual_tokens")
    video = oracle.instructblip(CONFIG, seed=0, kind="InstructBlipVideo")
    video.load_state_dict(model.state_dict())
    oracle.assert_close(ours, oracle.visual_tokens(video, **image_inputs(frames, question)))
    assert not states[-1].memory.length.any()


@pytest.mark.parametrize(
    "rows",
    [32000, 32001, 32064],
    ids=["Vicuna's own", "with LAVIS's pad token", "as Hugging Face pads it"],
)
def test_the_vocabularies_of_published_checkpoints(rows):
    """Logits of every row, from given query rows on."""
    llm = dataclasses.replace(CONFIG.llm, vocab_size=rows, width=32, mlp_width=64)
    config = dataclasses.replace(CONFIG, llm=llm)
    model = oracle.instructblip(config, seed=14)
    params = names.instructblip(model.state_dict(), config)
    state, question = init_state(config, jnp.zeros(2, jnp.int32)), random_question(config)
    queries = np.random.default_rng(7).normal(size=state.queries.shape).astype(np.float32)
    length = config.qformer.num_queries + question.llm_ids.shape[1]
    state = state.replace(queries=queries)
    logits, _ = run(config, params, state.queries, question, length, method="prefill")
    assert logits.shape == (2, rows)

    inputs = with_positions(language_inputs(config, question.llm_ids, question.llm_mask))
    words = model.get_input_embeddings()(torch.from_numpy(question.llm_ids).long())
    visual = model.language_projection(torch.from_numpy(queries))
    del inputs["input_ids"]
    expected = model.language_model(inputs_embeds=torch.cat([visual, words], dim=1), **inputs)
    oracle.assert_close(logits, expected.logits[:, -1])


def test_at_full_width_every_stage_equals_the_oracle():
    config = FULL_WIDTH
    model = oracle.instructblip(config, seed=6)
    params = names.instructblip(model.state_dict(), config)
    frames, question = random_frames(config, 1, 1), random_question(config)
    question = jax.tree.map(lambda leaf: leaf[1:], question)  # the padded one
    features = run(config, params, frames, method="encode_frames")
    state = init_state(config, jnp.ones(1, jnp.int32))
    valid = jnp.ones((1, 1), bool)
    state = run(config, params, features, valid, question, state, method="read")
    visual = run(config, params, state.queries, method="visual_tokens")
    length = config.qformer.num_queries + question.llm_ids.shape[1]
    logits, _ = run(config, params, state.queries, question, length, method="prefill")

    inputs = with_positions(language_inputs(config, question.llm_ids, question.llm_mask))
    stages = model.vision_model.encoder.layers[-1], model.language_projection
    with oracle.outputs_of(stages) as seen:
        expected = model(**image_inputs(frames[:, 0], question), **inputs)
    tokens, projected = seen
    normalised = model.vision_model.post_layernorm(tokens)
    queries, _, probs = oracle.qformer(
        model, question.qformer_ids, question.qformer_mask, normalised
    )
    assert tokens.shape == (1, 257, 1408) and queries.shape == (1, 32, 768)
    oracle.assert_close(features[:, 0], tokens)
    # By slot: an empty memory takes the first frame in its order.
    oracle.assert_close(
        state.memory.score[..., :257], torch.stack([each.sum((1, 2)) for each in probs])
    )
    oracle.assert_close(state.queries, queries)
    oracle.assert_close(visual, projected)
    oracle.assert_close(logits, expected.logits[:, -1])
