"""Whether a video is what its annotation says."""

import dataclasses
from pathlib import Path
from typing import Any

from adacm2_jax.errors import DataError
from adacm2_jax.tasks.task import Item
from adacm2_jax.video.frames import Sampling, read_frames
from adacm2_jax.video.jpegs import as_video

#: Seconds by which an annotation may be longer than its video.
SLACK = 1.0
_NAMED = 3


def check(
    name: str, path: Path, items: tuple[Item, ...]
) -> tuple[dict[str, Any], bytes, tuple[Item, ...]]:
    """A video, and whether it is what its annotation says.

    Returns:
      What is known of it (``name``; ``items``, how many are kept; ``error``, why it cannot be
      decoded; ``mismatch``, where its annotation goes beyond it), its bytes, and the items that are
      kept: an end behind the video's becomes the video's; what begins behind it is left out.
    """
    try:
        video = as_video(path) if path.is_dir() else path.read_bytes()
        # The first picture and the last: a file that is cut short has no last one.
        count, chunks = read_frames(video, Sampling("uniform", num_frames=2), size=16)
        last = None
        for chunk in chunks:
            last = chunk
        if last is None or not count:
            raise DataError("it has no picture")
        seconds = _duration(video)
    except (DataError, OSError) as error:
        return {"name": name, "error": str(error)[:300]}, b"", ()
    kept, beyond = [], []
    for item in items:
        if item.at is not None and item.at > seconds + SLACK:
            beyond.append(f"{item.id}: asked at {item.at:g} s, left out")
        elif (item.start or 0.0) >= seconds:
            beyond.append(f"{item.id}: begins at {item.start:g} s, left out")
        elif item.end is not None and item.end > seconds + SLACK:
            beyond.append(f"{item.id}: ends at {item.end:g} s, read to the video's end")
            kept.append(dataclasses.replace(item, end=None))
        else:
            kept.append(item)
    line: dict[str, Any] = {"name": name, "items": len(kept)}
    if beyond:
        more = f" and {len(beyond) - _NAMED} more" if len(beyond) > _NAMED else ""
        line["mismatch"] = f"lasts {seconds:.2f} s; {'; '.join(beyond[:_NAMED])}{more}"
    return line, video, tuple(kept)


def _duration(video: bytes) -> float:
    from adacm2_jax.video.decoder import Decoder

    return Decoder(video).duration
