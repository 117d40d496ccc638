"""The ViT that is made where none is published: what its tokens say when it has learned."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from adacm2_jax.errors import UserError
from adacm2_jax.models.params import param_shapes
from adacm2_jax.models.vit import VisionTransformer, normalise
from adacm2_jax.training.pretrain import pretrain_vision
from tests.small import quick_compilation, small_model

CONFIG = small_model()
VISION = CONFIG.vision


@pytest.fixture(scope="module", autouse=True)
def quick(compiled_once):
    with quick_compilation():
        yield


def corners(rows: int, seed: int):
    """Noise, and a bright square in one of four corners: what a token elsewhere cannot see."""
    rng, side = np.random.default_rng(seed), VISION.image_size
    half = side // 2
    while True:
        images = rng.integers(0, 120, (rows, side, side, 3), dtype=np.uint8)
        corner = rng.integers(4, size=rows)
        for image, down, right in zip(images, corner // 2, corner % 2, strict=True):
            image[down * half :, right * half :][:half, :half] += 100
        yield images, {"corner": corner}


def told_apart(params: dict) -> np.ndarray:
    """For each token, how often a linear reading of it, fitted to other images, is right,
    float[P]."""
    model = VisionTransformer(VISION, remat=False)
    tree = traverse_util.unflatten_dict(params, sep="/")["vision"]
    features, labels = [], []
    for seed in (5, 6):
        images, label = next(corners(400, seed))
        tokens = jax.jit(lambda images: model.apply({"params": tree}, normalise(images)))(images)
        ones = np.ones((*tokens.shape[:2], 1))
        features.append(np.concatenate([np.asarray(tokens, np.float64), ones], -1))
        labels.append(label["corner"])
    right = []
    for token in range(features[0].shape[1]):
        fitted = np.linalg.lstsq(features[0][:, token], np.eye(4)[labels[0]], rcond=1e-6)[0]
        right.append(((features[1][:, token] @ fitted).argmax(1) == labels[1]).mean())
    return np.array(right)


def train(steps: int, **options) -> dict:
    options = {"learning_rate": 3e-3} | options
    return pretrain_vision(VISION, corners(32, 0), {"corner": 4}, steps=steps, **options)


def test_every_token_learns_to_name_what_the_image_shows():
    before, after = train(1, learning_rate=1e-9), train(300)
    shapes = {path: value.shape for path, value in after.items()}
    assert shapes == {
        path: shape for path, shape in param_shapes(CONFIG).items() if path.startswith("vision/")
    }
    # Of 400 images a share is known to ± 0.025.
    assert told_apart(before).max() < 0.7
    assert told_apart(after).min() > 0.85


def test_the_seed_decides():
    one, same, other = train(2), train(2), train(2, seed=1)
    for path, value in one.items():
        np.testing.assert_array_equal(value, same[path])
    assert any((value != other[path]).any() for path, value in one.items())


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(UserError, match="loss nan; lower its learning rate"):
        train(5, learning_rate=1e30)
