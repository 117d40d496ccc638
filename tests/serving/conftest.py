"""Engines over the small model."""

import dataclasses

import pytest

from adacm2_jax.inference.processor import train_tokenizers
from adacm2_jax.inference.session import Session, open_memory
from adacm2_jax.serving.engine import Engine
from adacm2_jax.serving.limits import Limits
from adacm2_jax.serving.table import Table
from tests.inference.test_session import CONFIG, OTHER, make_model, make_params
from tests.small import QUESTION

ROWS = 3
LATE = "what else?"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    texts = [QUESTION, OTHER, LATE]
    processor = train_tokenizers(texts, CONFIG, tmp_path_factory.mktemp("tokenizers"))
    return dataclasses.replace(make_model(make_params(1), processor), narrowest=24)


@pytest.fixture(scope="module")
def size(model) -> int:
    """Bytes of a session with one known question."""
    tokens = 2 * CONFIG.vision.tokens_per_frame
    return Session(model, (QUESTION,), 1.0, open_memory(tokens)).size


@pytest.fixture
def start(model, tmp_path):
    """Starts engines, and stops them."""
    running = []

    def begin(directory="sessions", model=model, watch=lambda name, value: None, **limits):
        bounds = Limits(**({"rows": ROWS} | limits))
        made = lambda: Table(model, bounds, tmp_path / directory)  # noqa: E731
        engine = Engine(model, bounds, made, watch)
        engine.start()
        running.append(engine)
        return engine

    yield begin
    for engine in running:
        engine.stop()
