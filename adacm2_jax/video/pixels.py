"""From a decoder's frame to a picture: colours and rotation."""

from __future__ import annotations

from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

# FFmpeg's number of "unspecified".
_UNSPECIFIED = 2


class Painter:
    """Converts frames of one video to upright RGB pictures.

    Attributes:
        unknown_matrix: FFmpeg's number of a colour matrix that it cannot convert, if one came.

    Args:
        threads: for the conversion.
    """

    def __init__(self, threads: int):
        self._threads = threads
        self._reformatter = VideoReformatter()
        self._matrix: tuple[int, int, int, int] | None = None
        self.unknown_matrix: int | None = None

    def to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """Converts by the frame's own colour matrix and range, upright: uint8[h, w, 3].

        A matrix that FFmpeg cannot convert (YCgCo, ICtCp, constant luminance: mostly written by
        mistake) is taken for one that is not specified.
        """
        try:
            converted = self._converted(frame)
        except av.FFmpegError:
            if frame.colorspace == _UNSPECIFIED:
                raise
            self.unknown_matrix = int(frame.colorspace)
            frame.colorspace = _UNSPECIFIED
            converted = self._converted(frame)
        picture: np.ndarray = converted.to_ndarray()
        a, b, c, d = self.display_matrix(frame)
        if not a:
            picture = picture.swapaxes(0, 1)
            a, d = c, b
        if a < 0:
            picture = picture[:, ::-1]
        if d < 0:
            picture = picture[::-1]
        return np.ascontiguousarray(picture)

    def display_matrix(self, frame: av.VideoFrame) -> tuple[int, int, int, int]:
        """The signs (a, b, c, d) of the display matrix: x' = a·x + c·y, y' = b·x + d·y.

        Turned to the nearest quarter: either a and d are zero, or b and c. Upright: (1, 0, 0, 1).
        """
        if self._matrix is None:
            data: Any = frame.side_data.get("DISPLAYMATRIX")
            values = np.frombuffer(bytes(data), np.int32) if data else np.zeros(9, np.int32)
            a, b, c, d = (int(values[i]) for i in (0, 1, 3, 4))
            if abs(b) > abs(a) and b and c:
                self._matrix = (0, 1 if b > 0 else -1, 1 if c > 0 else -1, 0)
            else:
                self._matrix = (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
        return self._matrix

    def _converted(self, frame: av.VideoFrame) -> av.VideoFrame:
        return self._reformatter.reformat(frame, format="rgb24", threads=self._threads)
