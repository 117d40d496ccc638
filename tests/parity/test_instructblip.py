"""The whole model on one frame against InstructBLIP, and on more against InstructBlipVideo."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adacm2_jax.config import MemoryConfig, tiny
from adacm2_jax.models.adacm2 import AdaCM2, Question, init_params, init_state
from tests.parity import names, oracle

CONFIG = tiny()
N = CONFIG.qformer.num_queries
IMAGE_TOKEN = CONFIG.llm.vocab_size - 1


@pytest.fixture(scope="module")
def model():
    return oracle.instructblip(CONFIG, seed=10)


@pytest.fixture(scope="module")
def params(model):
    return names.instructblip(model.state_dict(), CONFIG)


def random_frames(*shape: int) -> np.ndarray:
    size = CONFIG.vision.image_size
    rng = np.random.default_rng(4)
    return rng.integers(256, size=(*shape, size, size, 3), dtype=np.uint8)


def random_question(prompt_width: int = 7) -> Question:
    """Two questions: the first fills its row, the second is padded as each network wants it."""
    rng = np.random.default_rng(5)
    shape = (2, prompt_width)
    return Question(
        qformer_ids=rng.integers(CONFIG.qformer.vocab_size, size=(2, 6)).astype(np.int32),
        qformer_mask=np.arange(6) < np.array([[6], [2]]),
        llm_ids=rng.integers(IMAGE_TOKEN, size=shape).astype(np.int32),
        llm_mask=np.arange(prompt_width) >= np.array([[0], [prompt_width - 3]]),
    )


def watch(config, params, frames, question):
    """The state after the frames of a fresh video, one compiled step a frame."""
    model = AdaCM2(config)

    @jax.jit
    def step(params, frame, state):
        features = model.apply({"params": params}, frame, method="encode_frames")
        valid = jnp.ones(frame.shape[:2], bool)
        return model.apply({"params": params}, features, valid, question, state, method="stream")

    states = [init_state(config, jnp.full((len(frames),), frames.shape[1]))]
    for t in range(frames.shape[1]):
        states.append(step(params, frames[:, t : t + 1], states[-1]))
    return states[1:]


@pytest.fixture(scope="module")
def state(params):
    """After the one frame of two videos."""
    return watch(CONFIG, params, random_frames(2, 1), random_question())[0]


def run(params, *arguments, method: str):
    """A method of the model, compiled; what is no array in ``arguments`` is static."""
    apply = functools.partial(AdaCM2(CONFIG).apply, method=method)
    static = [i for i, argument in enumerate(arguments, 1) if isinstance(argument, int)]
    return jax.jit(apply, static_argnums=static)({"params": params}, *arguments)


def image_inputs(frames, question) -> dict:
    """What the oracle is told about the frame and about the Q-Former's text."""
    return dict(
        pixel_values=oracle.pixels(frames),
        qformer_input_ids=torch.from_numpy(question.qformer_ids).long(),
        qformer_attention_mask=torch.from_numpy(question.qformer_mask).long(),
    )


def language_inputs(ids: np.ndarray, mask: np.ndarray) -> dict:
    """What its language model is told: a place for every visual token, then the text."""
    ids = np.concatenate([np.full((len(ids), N), IMAGE_TOKEN), ids], axis=1)
    mask = np.concatenate([np.ones((len(mask), N), bool), mask], axis=1)
    return dict(
        input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long()
    )


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
    frames, question = random_frames(2, 1), random_question()
    expected = model.get_image_features(**image_inputs(frames[:, 0], question))
    oracle.assert_close(run(params, state, method="visual_tokens"), expected.pooler_output)


def test_prefill_and_decoding_equal_the_oracles_whole_sequence(model, params, state):
    """Left-padded prompts, and four more tokens one by one, on top of one frame."""
    frames, question, steps = random_frames(2, 1), random_question(), 4
    answer = np.random.default_rng(6).integers(IMAGE_TOKEN, size=(2, steps)).astype(np.int32)
    inputs = language_inputs(
        np.concatenate([question.llm_ids, answer], axis=1),
        np.concatenate([question.llm_mask, np.ones_like(answer, bool)], axis=1),
    )
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = model(**image_inputs(frames[:, 0], question), **inputs, position_ids=positions)
    expected = expected.logits[:, -steps - 1 :]

    length = N + question.llm_ids.shape[1] + steps
    logits, cache = run(params, state, question, length, method="prefill")
    oracle.assert_close(logits, expected[:, 0])
    decode = jax.jit(functools.partial(AdaCM2(CONFIG).apply, method="decode"))
    for i in range(steps):
        logits, cache = decode({"params": params}, answer[:, i], cache)
        oracle.assert_close(logits, expected[:, i + 1])


def test_training_loss_equals_the_oracle(model, params, state):
    """Prompt, answer, then padding; the mean over the answers' tokens of both rows."""
    frames, question = random_frames(2, 1), random_question(prompt_width=9)
    mask = np.arange(9) < np.array([[9], [6]])
    targets = mask & (np.arange(9) >= np.array([[5], [3]]))
    question = question.replace(llm_mask=mask)
    inputs = language_inputs(question.llm_ids, mask)
    labels = np.where(targets, question.llm_ids, -100)
    labels = np.concatenate([np.full((2, N), -100), labels], axis=1)
    expected = model(
        **image_inputs(frames[:, 0], question), **inputs, labels=torch.from_numpy(labels)
    )
    loss, share = run(params, state, question, targets, method="answer_loss")
    oracle.assert_close(loss, expected.loss)
    predicted = expected.logits[:, N - 1 : -1].argmax(-1).numpy()
    assert share == pytest.approx((predicted == question.llm_ids)[targets].mean())


def test_frames_with_an_empty_memory_equal_instructblip_video(model, params):
    """Ratios of zero forget everything after each frame: every frame is read by itself."""
    frames, question = random_frames(2, 3), random_question()
    forgetful = MemoryConfig(recent_ratio="0", conserve_ratio="0")
    config = dataclasses.replace(CONFIG, memory=forgetful)
    states = watch(config, params, frames, question)
    queries = jnp.concatenate([state.queries for state in states], axis=1)
    ours = run(params, states[0].replace(queries=queries), method="visual_tokens")
    video = oracle.instructblip(CONFIG, seed=0, kind="InstructBlipVideo")
    video.load_state_dict(model.state_dict())
    expected = video.get_video_features(**image_inputs(frames, question)).pooler_output
    oracle.assert_close(ours, expected)
    assert not states[-1].memory.length.any()
