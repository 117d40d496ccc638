"""What is said of a video: what its file tells of itself, and that it ends too early."""

from __future__ import annotations

import os
from dataclasses import dataclass

from adacm2_jax.errors import DataError

Source = str | os.PathLike[str] | bytes

AGAIN = "download or record it again"


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself.

    Attributes:
        path: the file, or "<N bytes>" for a video given as bytes.
        container: FFmpeg's name of the container format ("mov,mp4,m4a,3gp,3g2,mj2").
        codec: FFmpeg's name of the codec ("h264").
        width, height: pixels as shown, after the rotation; their aspect ratio is not applied.
        rotation: degrees clockwise (0, 90, 180 or 270) that turn the stored picture upright.
        duration: seconds from the file's start to the picture's end.
        fps: average frames per second; 0.0 where the file does not say.
    """

    path: str
    container: str
    codec: str
    width: int
    height: int
    rotation: int
    duration: float
    fps: float


class TruncatedError(DataError):
    """The file ends before its own header says: `args[0]` is the finding, `str` adds the remedy."""

    def __str__(self) -> str:
        return (
            f"{self.args[0]}, so nothing was answered: {AGAIN}, or go on with the frames that are "
            "there: --on-truncated=use (adacm2 ask), --config.data.on_truncated=use (the scripts)"
        )
