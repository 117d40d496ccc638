"""Frames of a video, chosen by time stamps and resized, in chunks of bounded memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from adacm2_jax.errors import DataError
from adacm2_jax.video.container import Source
from adacm2_jax.video.decoder import Decoder, TruncatedError, VideoInfo
from adacm2_jax.video.resize import RESIZES
from adacm2_jax.video.sampling import Sampling, sample_times

__all__ = ["Chunk", "Sampling", "VideoInfo", "probe", "read_clip", "read_frames", "sample_times"]


@dataclass(frozen=True)
class Chunk:
    """Consecutive chosen frames.

    Attributes:
        frames: uint8[n, size, size, 3], RGB.
        times: float64[n], the instants asked for, in seconds from the video's start.
    """

    frames: np.ndarray
    times: np.ndarray


def probe(source: Source) -> VideoInfo:
    """Describes a video file; only its first frame is decoded.

    Args:
        source: a path, or the encoded file's bytes.
    Raises:
        DataError: the source is missing, empty, incomplete, or no video.
    """
    return Decoder(source).info()


def read_frames(
    source: Source,
    sampling: Sampling,
    *,
    size: int,
    start: float | None = None,
    end: float | None = None,
    chunk: int = 16,
    rng: np.random.Generator | None = None,
    resize: str = "clean",
    on_truncated: Literal["error", "use"] = "error",
    on_warning: Callable[[str], None] = warnings.warn,
) -> tuple[int, Iterator[Chunk]]:
    """Opens a video and reads the chosen frames, lazily and in order.

    The frame of an instant is the one shown then: the last that starts no later, so a variable
    frame rate is honoured. The whole picture is turned upright and squashed to `size` x `size`, its
    aspect ratio not kept, by default with PIL's bicubic filter as in LAVIS. Host memory holds one
    chunk and the decoder's own few frames, whatever the video's length.

    Args:
        source: a path, or the encoded file's bytes.
        sampling: which frames are taken.
        size: side of the frames, pixels.
        start, end: the part of the video that counts, seconds; None for the video's own.
        chunk: frames of a chunk; the last may have fewer.
        rng: see `sample_times`.
        resize: how frames are made square, a name in `resize.RESIZES`: "clean", or "ma_lmm".
        on_truncated: what to do when the file ends before its header says: "error" raises; "use"
            warns and ends the iterator early, so **the frames that came count, not the number that
            was announced**.
        on_warning: is given one line when something was passed over.
    Returns:
        The number of frames T that the header promises, and an iterator over chunks.
    Raises:
        DataError: at once if the file cannot be opened, the times are outside the video, or the
            index of an MP4 file shows that its end is missing; from the iterator if only decoding
            finds that, or if no frame can be decoded.
    """
    if on_truncated not in ("error", "use"):
        raise DataError(f"on_truncated={on_truncated!r}: must be 'error' or 'use'")
    if resize not in RESIZES:
        raise DataError(f"resize={resize!r}: must be {' or '.join(RESIZES)}")
    if size < 1 or chunk < 1:
        raise DataError(f"size={size}, chunk={chunk}: both must be 1 or more")
    decoder = Decoder(source)
    try:
        times = sample_times(decoder.duration, sampling, start, end, rng)
    except DataError as error:
        raise DataError(f"{decoder.name}: {error}") from None
    if on_truncated == "error":
        decoder.check_stored(times[-1])
    return len(times), _chunks(decoder, times, size, chunk, resize, on_truncated, on_warning)


def read_clip(source: Source, sampling: Sampling, *, size: int, **options: object) -> np.ndarray:
    """Reads all chosen frames of a short clip at once.

    Args:
        source, sampling, size, options: as for `read_frames`.
    Returns:
        uint8[T, size, size, 3]; of a file that is cut short, with `on_truncated="use"`, the frames
        that are there.
    Raises:
        DataError: as for `read_frames`.
    """
    _, chunks = read_frames(source, sampling, size=size, **options)
    pieces = [piece.frames for piece in chunks]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _chunks(
    decoder: Decoder,
    times: np.ndarray,
    size: int,
    chunk: int,
    resize: str,
    on_truncated: str,
    on_warning: Callable[[str], None],
) -> Iterator[Chunk]:
    shown, picture, done = None, None, 0
    truncated: TruncatedError | None = None
    while done < len(times) and truncated is None:
        frames = np.empty((min(chunk, len(times) - done), size, size, 3), np.uint8)
        count = 0
        for count, time in enumerate(times[done : done + chunk]):
            try:
                frame = decoder.frame_at(time)
            except TruncatedError as error:
                truncated = error
                break
            if frame is not shown:
                shown, picture = frame, RESIZES[resize](decoder.to_rgb(frame), size)
            frames[count] = picture
        else:
            count += 1
        if truncated is not None and (on_truncated == "error" or done + count == 0):
            raise truncated
        if count:
            yield Chunk(frames[:count], times[done : done + count])
        done += count
    if truncated is not None:
        on_warning(f"{truncated.args[0]}: the {done} of {len(times)} frames before that are used")
    if decoder.damaged:
        on_warning(f"{decoder.name}: damaged packets passed over: {decoder.damaged}")
