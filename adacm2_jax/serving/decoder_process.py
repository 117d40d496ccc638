"""Decodes for a server, in a process of its own: ``python -m adacm2_jax.serving.decoder_process``.

No file takes the server down: this process has a limit of memory, writes no file, and is killed
when it takes too long. It reads a job a line from stdin, JSON, and writes each answer as a line of
JSON, then so many bytes. Frames are sent when they are asked for with an empty line.

It imports neither JAX nor anything of the model.
"""

import json
import os
import resource
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from adacm2_jax.errors import DataError, UserError, printable, reason
from adacm2_jax.video.resize import RESIZES
from adacm2_jax.video.sampling import Sampling

_PICTURES = ("JPEG", "PNG", "WEBP")


def main() -> None:
    """Serves jobs until stdin ends; the arguments are the bytes of memory it may have."""
    memory = int(sys.argv[1])
    jobs = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)  # what libraries print must not come between
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    warnings.simplefilter("ignore")
    import av  # noqa: F401 — before the limits, so that a job's memory is its own
    import PIL.Image

    PIL.Image.MAX_IMAGE_PIXELS = None  # looked at below
    for what, limit in (
        (resource.RLIMIT_AS, _mapped() + memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    threading.Thread(target=_follow_parent, daemon=True).start()
    while line := jobs.readline():
        _serve(json.loads(line), jobs, answers)


def _serve(job: dict[str, Any], jobs: IO[bytes], answers: IO[bytes]) -> None:
    """One job: how many frames there will be, the frames, and the end or an error."""
    try:
        total, chunks = read(job)
        _send(answers, {"total": total})
        while jobs.readline() == b"\n":
            frames = next(chunks, None)
            if frames is None:
                _send(answers, {"end": True})
                return
            _send(answers, {"frames": len(frames)}, np.ascontiguousarray(frames).tobytes())
        os._exit(0)  # the server is gone
    except UserError as error:
        _send(answers, {"error": str(error)})
    except MemoryError:
        _send(answers, {"error": f"{job['name']}: too much memory is needed to decode it"})
    except Exception as error:  # whatever a library makes of a hostile file
        what = printable(f"{type(error).__name__}: {reason(error)}")
        _send(answers, {"error": f"{job['name']}: cannot be read ({what})"})


def read(job: dict[str, Any]) -> tuple[int, Iterator[np.ndarray]]:
    """Opens what a job names.

    Args:
      job: ``kind`` (``video`` or ``pictures``), ``paths``, ``name`` as the caller knows it,
        ``size``, ``resize``, ``chunk``, ``pixels``, ``frames``; of a video ``fps``, ``start``,
        ``end``, ``on_truncated``.

    Returns:
      How many frames there are, and chunks of them, uint8[n, size, size, 3].

    Raises:
      DataError: for what cannot be read, or is more than the job allows.
    """
    if job["kind"] == "pictures":
        return len(job["paths"]), _pictures(job)
    return _video(job)


def _video(job: dict[str, Any]) -> tuple[int, Iterator[np.ndarray]]:
    from adacm2_jax.video.container import VideoFile
    from adacm2_jax.video.frames import read_frames

    (path,) = job["paths"]
    try:
        context = VideoFile(path).stream.codec_context
        _check_pixels(context.width, context.height, job)
        total, chunks = read_frames(
            path,
            Sampling("fps", fps=job["fps"]),
            size=job["size"],
            chunk=job["chunk"],
            start=job["start"],
            end=job["end"],
            resize=job["resize"],
            on_truncated=job["on_truncated"],
            on_warning=lambda _: None,
        )
        if total > job["frames"]:
            raise DataError(
                f"{job['name']}: has {total:,} frames at {job['fps']:g} a second, the limit is "
                f"{job['frames']:,}: ask for fewer a second, or for a part of it"
            )
    except DataError as error:
        raise _renamed(error, path, job) from None
    return total, _renaming(chunks, path, job)


def _renaming(chunks: Iterator[Any], path: str, job: dict[str, Any]) -> Iterator[np.ndarray]:
    try:
        for chunk in chunks:
            yield chunk.frames
    except DataError as error:
        raise _renamed(error, path, job) from None


def _renamed(error: DataError, path: str, job: dict[str, Any]) -> DataError:
    """The error with the name that the caller knows, not with a path of the server's."""
    return DataError(str(error).replace(printable(path), job["name"]))


def _pictures(job: dict[str, Any]) -> Iterator[np.ndarray]:
    import PIL.Image
    import PIL.ImageOps

    shrink, size = RESIZES[job["resize"]], job["size"]
    for first in range(0, len(job["paths"]), job["chunk"]):
        frames = []
        for path in job["paths"][first : first + job["chunk"]]:
            try:
                with PIL.Image.open(path, formats=_PICTURES) as picture:
                    _check_pixels(*picture.size, job)
                    upright = PIL.ImageOps.exif_transpose(picture).convert("RGB")
            except PIL.UnidentifiedImageError:
                raise DataError(
                    f"{job['name']}: is no picture; give JPEG, PNG or WebP, and a video as one"
                ) from None
            except (OSError, SyntaxError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                raise DataError(
                    f"{job['name']}: is no picture that can be read "
                    f"({printable(reason(error)).replace(printable(path), 'it')}): give JPEG, PNG "
                    "or WebP"
                ) from None
            frames.append(shrink(np.asarray(upright), size))
        yield np.stack(frames)


def _check_pixels(width: int, height: int, job: dict[str, Any]) -> None:
    if width * height > job["pixels"]:
        raise DataError(
            f"{job['name']}: is {width} x {height}, the limit is {job['pixels']:,} pixels: make "
            "it smaller"
        )


def _follow_parent() -> None:
    """Ends this process when its parent has ended, however that was."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def _mapped() -> int:
    """Bytes of addresses that this process has already."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _send(answers: IO[bytes], header: dict[str, Any], content: bytes = b"") -> None:
    header["bytes"] = len(content)
    answers.write(json.dumps(header).encode() + b"\n" + content)
    answers.flush()


if __name__ == "__main__":
    main()
