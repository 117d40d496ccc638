"""Frames to squares: as LAVIS makes them, or exactly as MA-LMM's evaluation does."""

from __future__ import annotations

import numpy as np
from PIL import Image

__all__ = ["RESIZES", "clean", "ma_lmm"]

# The free parameter of PyTorch's bicubic kernel; PIL and JAX have -0.5.
_A = -0.75


def clean(picture: np.ndarray, size: int) -> np.ndarray:
    """PIL's bicubic filter, antialiased; the aspect ratio is not kept. The image path of LAVIS.

    Args:
        picture: uint8[height, width, 3].
        size: side of the result, pixels.
    Returns:
        uint8[size, size, 3], equal to PIL's to the last bit.
    """
    if picture.shape[:2] == (size, size):
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))


def ma_lmm(picture: np.ndarray, size: int) -> np.ndarray:
    """What MA-LMM's evaluation does to a frame, its overflow included.

    ``torch.nn.functional.interpolate(mode="bicubic")`` on floats, without antialiasing, then a cast
    to uint8 that is not clamped: where the filter overshoots, 260 becomes 4 and -3 becomes 253, so
    bright edges get black dots and dark ones white dots. Their published numbers were measured so.

    Their frames are also prepared beforehand: 10 a second, shrunk to a short side of 256 pixels and
    stored as JPEG. That belongs to the data and is not done here; to repeat it, prepare the videos
    in the same way.

    Args:
        picture: uint8[height, width, 3].
        size: side of the result, pixels.
    Returns:
        uint8[size, size, 3].
    """
    return wrapped(bicubic(picture, size))


#: By the name that ``data.resize`` gives.
RESIZES = {"clean": clean, "ma_lmm": ma_lmm}


def bicubic(picture: np.ndarray, size: int) -> np.ndarray:
    """PyTorch's bicubic interpolation: a = -0.75, align_corners False, no antialiasing.

    Weights and sums are exact but for the last rounding, so one colour stays one colour. PyTorch
    sums in float32, in an order that depends on its build: a flat 100 comes out as 99.99998 in a
    third of the pixels, and its cast takes a whole level from them.

    Args:
        picture: [height, width, channels], of any type.
        size: side of the result, pixels.
    Returns:
        float32[size, size, channels]; may lie outside the range of the input.
    """
    return _along(_along(picture, 1, size), 0, size).astype(np.float32)


def wrapped(values: np.ndarray) -> np.ndarray:
    """Floats to uint8 as C casts them: towards zero, modulo 256."""
    return values.astype(np.int64).astype(np.uint8)


def _along(values: np.ndarray, axis: int, size: int) -> np.ndarray:
    length = values.shape[axis]
    # Where each pixel lies is rounded to float32, as PyTorch does.
    scale = np.float64(np.float32(length) / np.float32(size))
    at = (scale * (np.arange(size) + 0.5) - 0.5).astype(np.float32).astype(np.float64)
    low = np.floor(at)
    after = at - low
    weights = (_far(after + 1), _near(after), _near(1 - after), _far(2 - after))
    total = np.zeros(())
    for tap, weight in enumerate(weights):
        index = np.clip(low.astype(np.int64) + tap - 1, 0, length - 1)
        shape = [size if i == axis else 1 for i in range(values.ndim)]
        total = total + values.take(index, axis) * weight.reshape(shape)
    return total


def _near(x: np.ndarray) -> np.ndarray:
    """Weight of a pixel at a distance of 0 to 1."""
    return ((_A + 2) * x - (_A + 3)) * x * x + 1


def _far(x: np.ndarray) -> np.ndarray:
    """Weight of a pixel at a distance of 1 to 2."""
    return ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A
