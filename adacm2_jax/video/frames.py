"""Frames of a video, chosen by time stamps and resized, in chunks of bounded memory.

Importing this needs no PyAV; reading a video does.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from adacm2_jax.errors import DataError, printable, reason
from adacm2_jax.video.info import Source, TruncatedError, VideoInfo
from adacm2_jax.video.resize import RESIZES
from adacm2_jax.video.room import check_room
from adacm2_jax.video.sampling import FEWER, Sampling, sample_times

if TYPE_CHECKING:
    from adacm2_jax.video.decoder import Decoder

__all__ = [
    "Chunk",
    "Sampling",
    "VideoInfo",
    "pictures_at",
    "probe",
    "read_at",
    "read_clip",
    "read_frames",
    "read_pictures",
    "sample_times",
    "window_times",
]


@dataclass(frozen=True)
class Chunk:
    """Consecutive chosen frames.

    Attributes:
        frames: uint8[n, size, size, 3], RGB.
        times: float64[n], the instants asked for, in seconds from the file's start.
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
    with _as_data_error(source):
        return _open(source).info()


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
    threads: int | None = None,
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
        start, end: the part of the video that counts, seconds from the file's start, as a player
            counts them. None for the picture's own start and end; sound may begin before it. Before
            the picture begins, its first frame is taken.
        chunk: frames of a chunk; the last may have fewer.
        rng: see `sample_times`.
        resize: how frames are made square, a name in `resize.RESIZES`: "clean", or "ma_lmm".
        on_truncated: what to do when the file ends before its header says: "error" raises; "use"
            warns and ends the iterator early, so **the frames that came count, not the number that
            was announced**.
        on_warning: is given one line when something was passed over.
        threads: that decode at most; None for as many as there are cores. Whoever reads several
            videos at a time needs less of the processor with one each.
    Returns:
        The number of frames T that the header promises, and an iterator over chunks.
    Raises:
        DataError: at once if the file cannot be opened, the times are outside the video, or the
            index of an MP4 file shows that its end is missing; from the iterator if only decoding
            finds that, or if no frame can be decoded. Whatever else a video makes the decoder
            raise ends as this error, too.
    """
    if on_truncated not in ("error", "use"):
        raise DataError(f"on_truncated={on_truncated!r}: must be 'error' or 'use'")
    if resize not in RESIZES:
        raise DataError(f"resize={resize!r}: must be {' or '.join(RESIZES)}")
    if size < 1 or chunk < 1:
        raise DataError(f"size={size}, chunk={chunk}: both must be 1 or more")
    with _as_data_error(source):
        decoder = _open(source, threads)
        times = _times(decoder, sampling, start, end, rng)
        if on_truncated == "error":
            decoder.check_stored(times[-1])
    return len(times), _chunks(decoder, times, size, chunk, resize, on_truncated, on_warning)


def read_clip(source: Source, sampling: Sampling, *, size: int, **options: Any) -> np.ndarray:
    """Reads all chosen frames of a short clip at once.

    Args:
        source, sampling, size, options: as for `read_frames`.
    Returns:
        uint8[T, size, size, 3]; of a file that is cut short, with `on_truncated="use"`, the frames
        that are there.
    Raises:
        DataError: as for `read_frames`; or the clip is larger than the machine's memory.
    """
    count, chunks = read_frames(source, sampling, size=size, **options)
    what = f"the pixels of {count:,} frames"
    check_room(count * size * size * 3, f"{_name(source)}: {what}", FEWER, DataError)
    pieces = [piece.frames for piece in chunks]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def read_pictures(
    source: Source,
    sampling: Sampling,
    *,
    start: float | None = None,
    end: float | None = None,
) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """Opens a video and reads the frames that :func:`read_frames` chooses, in their own size.

    Args:
        source, sampling, start, end: as for `read_frames`.
    Returns:
        float64[T], the instants in seconds from the file's start, and an iterator over the frames,
        uint8[height, width, 3] each.
    Raises:
        DataError: as for `read_frames`, for a file that is cut short.
    """
    with _as_data_error(source):
        decoder = _open(source)
        times = _times(decoder, sampling, start, end)
        decoder.check_stored(times[-1])
    return times, _pictures(decoder, times)


def window_times(
    source: Source,
    sampling: Sampling,
    windows: Sequence[tuple[float | None, float | None]],
    on_truncated: str = "error",
) -> list[np.ndarray | DataError]:
    """The instants that :func:`read_frames` chooses in each part of a video; nothing is decoded.

    Args:
        source, sampling, on_truncated: as for `read_frames`.
        windows: ``start`` and ``end`` of each part.
    Returns:
        For each float64[T], seconds from the file's start, or the error of that part alone.
    Raises:
        DataError: the file cannot be opened.
    """
    found: list[np.ndarray | DataError] = []
    with _as_data_error(source):
        decoder = _open(source)
        for start, end in windows:
            try:
                times = _times(decoder, sampling, start, end)
                if on_truncated == "error":
                    decoder.check_stored(times[-1])
                found.append(times)
            except DataError as error:
                found.append(error)
    return found


def read_at(
    source: Source,
    times: np.ndarray,
    *,
    size: int,
    resize: str = "clean",
    threads: int | None = None,
) -> tuple[np.ndarray, DataError | None]:
    """The frames shown at some instants, made square; those before whatever stops the decoder.

    Args:
        source, size, resize, threads: as for `read_frames`.
        times: float64[n], seconds from the file's start, not decreasing.
    Returns:
        uint8[m, size, size, 3], m at most n, and why the rest is missing, or None.
    """
    frames = np.empty((len(times), size, size, 3), np.uint8)
    done = 0
    try:
        with _as_data_error(source):
            decoder = _open(source, threads)
            read = _Reader(decoder, size, resize)
            for time in times:
                picture = read(np.array([time]))
                if read.truncated is not None:
                    return frames[:done], read.truncated
                frames[done] = picture[0]
                done += 1
    except DataError as error:
        return frames[:done], error
    return frames, None


def pictures_at(source: Source, times: Sequence[float]) -> Iterator[np.ndarray]:
    """The frames shown at some instants, in their own size.

    Args:
        source: as for `read_frames`.
        times: seconds from the file's start, not decreasing.
    Yields:
        uint8[height, width, 3], RGB.
    Raises:
        DataError: if the video cannot be read so far.
    """
    with _as_data_error(source):
        decoder = _open(source)
    yield from _pictures(decoder, times)


def _times(
    decoder: Decoder,
    sampling: Sampling,
    start: float | None,
    end: float | None,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    if start is None and (end is None or end > decoder.begins):
        start = decoder.begins
    try:
        return sample_times(decoder.duration, sampling, start, end, rng)
    except DataError as error:
        raise DataError(f"{decoder.name}: {error}") from None


def _pictures(decoder: Decoder, times: Sequence[float] | np.ndarray) -> Iterator[np.ndarray]:
    for time in times:
        with _as_data_error(decoder.name):
            picture = decoder.to_rgb(decoder.frame_at(float(time)))
        yield picture


def _chunks(
    decoder: Decoder,
    times: np.ndarray,
    size: int,
    chunk: int,
    resize: str,
    on_truncated: str,
    on_warning: Callable[[str], None],
) -> Iterator[Chunk]:
    read = _Reader(decoder, size, resize)
    done = 0
    while done < len(times) and read.truncated is None:
        wanted = times[done : done + chunk]
        with _as_data_error(decoder.name):
            frames = read(wanted)
        count = len(frames)
        if read.truncated is not None and (on_truncated == "error" or done + count == 0):
            raise read.truncated
        if count:
            yield Chunk(frames, wanted[:count])
        done += count
    if read.truncated is not None:
        on_warning(
            f"{read.truncated.args[0]}: the {done} of {len(times)} frames before that are used"
        )
    for line in decoder.warnings():
        on_warning(line)


class _Reader:
    """Reads frames of increasing instants, and converts a frame once where it is shown again.

    Attributes:
        truncated: why the last call gave fewer frames than were wanted, or None.
    """

    def __init__(self, decoder: Decoder, size: int, resize: str):
        self._decoder, self._size, self._resize = decoder, size, RESIZES[resize]
        self._shown: object = None
        self._picture = np.empty(0)
        self.truncated: TruncatedError | None = None

    def __call__(self, times: np.ndarray) -> np.ndarray:
        """uint8[n, size, size, 3], with n the number of `times` unless the file is cut short."""
        frames = np.empty((len(times), self._size, self._size, 3), np.uint8)
        for count, time in enumerate(times):
            try:
                frame = self._decoder.frame_at(time)
            except TruncatedError as error:
                self.truncated = error
                return frames[:count]
            if frame is not self._shown:
                self._picture = self._resize(self._decoder.to_rgb(frame), self._size)
                self._shown = frame
            frames[count] = self._picture
        return frames


def _open(source: Source, threads: int | None = None) -> Decoder:
    from adacm2_jax.video.decoder import Decoder  # PyAV is imported by the first that opens a file

    return Decoder(source, threads)


@contextlib.contextmanager
def _as_data_error(source: Source) -> Iterator[None]:
    """Ends whatever a video makes its readers raise as an error that names the video.

    One odd file among thousands must not end a run; what FFmpeg and its wrapper raise for such
    files is not known beforehand.
    """
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:  # still the error of one video: a header may ask for anything
        raise DataError(
            f"{_name(source)}: there is not enough memory to decode it ({printable(reason(error))})"
            ": free some, or read fewer videos at a time (eval.batch_size, data.workers)"
        ) from error
    except Exception as error:
        what = f"{type(error).__name__}: {reason(error)}"
        raise DataError(
            f"{_name(source)}: cannot be read ({printable(what)}): convert it to H.264 in MP4"
        ) from error


def _name(source: Source) -> str:
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else printable(os.fspath(source))
