"""Extracted frames as a video file: their JPEGs, unchanged, as a Motion-JPEG stream."""

import io
import re
from fractions import Fraction
from pathlib import Path

import av

from adacm2_jax.errors import DataError, printable

_FRAME = re.compile(r"frame(\d{6})\.jpg")


def as_video(directory: Path, fps: int = 10) -> bytes:
    """A Matroska file of the frames of a directory, ``frame000001.jpg`` and on.

    Nothing is decoded: the file holds the JPEGs' own bytes, one a frame.

    Args:
      directory: of the frames.
      fps: that they were extracted at.

    Raises:
      DataError: if there is none, one is missing between others, or is no JPEG.
    """
    where = printable(str(directory))
    numbers = {
        int(found[1]): path
        for path in directory.iterdir()
        if (found := _FRAME.fullmatch(path.name))
    }
    if sorted(numbers) != list(range(1, len(numbers) + 1)) or not numbers:
        missing = next(n for n in range(1, max(numbers, default=0) + 2) if n not in numbers)
        raise DataError(f"{where}: frame{missing:06}.jpg is missing")
    target = io.BytesIO()
    # Without a number that is drawn for every file: the same frames are the same bytes.
    with av.open(target, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mjpeg", rate=fps)
        for number, path in sorted(numbers.items()):
            data = path.read_bytes()
            if data[:2] != b"\xff\xd8":
                raise DataError(f"{where}/{path.name}: is no JPEG")
            if number == 1:
                stream.width, stream.height, stream.pix_fmt = _shape(path)
            packet = av.Packet(data)
            packet.stream = stream
            packet.time_base = Fraction(1, fps)
            packet.pts = packet.dts = number - 1
            packet.duration = 1
            packet.is_keyframe = True
            container.mux(packet)
    return target.getvalue()


def _shape(path: Path) -> tuple[int, int, str]:
    try:
        with av.open(str(path)) as picture:
            frame = next(picture.decode(video=0))
            return frame.width, frame.height, frame.format.name
    except (av.FFmpegError, StopIteration) as error:
        raise DataError(f"{printable(str(path))}: is no readable JPEG: {error}") from None
