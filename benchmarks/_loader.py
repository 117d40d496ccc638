"""One side of ``loader.py``: measures the loader of the checkout in which it is started.

Reads a measurement a line from stdin, as JSON, and answers each with a line: ``count``, what was
read; ``core``, seconds of processor time of all threads. It imports nothing of benchmarks/, and
calls what older checkouts have, too.
"""

import functools
import inspect
import json
import os
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, os.getcwd())

import av
import ml_dtypes
import numpy as np
from PIL import Image

from adacm2_jax.video.frames import Sampling
from data.feature_cache import cache, shards
from data.jsonl import Example
from data.pipeline import LoadClip, clips, iter_batches, stack

SIZE, TOKENS, WIDTH = 224, 257, 1408
VISION = {"width": WIDTH}


class Videos(list):
    """Examples in memory."""

    def fingerprint(self) -> str:
        return "1"


@functools.cache
def feature_set(directory: str, dtype: str, count: int, frames: int) -> Any:
    """Features as training opens them; the cache is made at the first call."""
    source = Videos(Example(str(n), b"%d" % n, "q", "a", None, None) for n in range(count))
    load = LoadClip(Sampling("uniform", num_frames=frames), frames, SIZE, False, "error")
    shape = (frames, TOKENS, WIDTH)
    os.makedirs(directory, exist_ok=True)
    made = cache.make_manifest(
        source, load, VISION, dtype=dtype, shards=min(count, 4), shape=shape, computed={}
    )
    manifest = cache.with_key(made)
    cache.write_manifest(directory, manifest)
    values = np.random.default_rng(0).standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
    for shard in range(manifest["shards"]):
        numbers = shards.shard_clips(manifest, shard)
        shards.write_shard(directory, manifest, shard, (values for _ in numbers))
    cache.finish(directory, manifest)
    older = "result" in inspect.signature(cache.open_features).parameters
    more = ("bfloat16",) if older else ()
    return cache.open_features(directory, source, load, VISION, shape, *more)


def features(directory: str, dtype: str, count: int, frames: int, batch: int) -> int:
    """Reads each clip once."""
    opened = feature_set(directory, dtype, count, frames)
    batches = iter_batches(opened.batch(batch, drop_remainder=True, batch_fn=stack), 0)
    done = sum(len(batch["frames"]) for batch in batches)
    batches.close()
    return done


def make_video(path: str, height: int, seconds: int) -> None:
    """H.264 with a key frame every 250 frames, as x264 makes by itself: noise that moves."""
    if os.path.exists(path):
        return
    width = height * 16 // 9 // 2 * 2
    still = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 65, 3))
    still = np.asarray(Image.fromarray(still.astype(np.uint8)).resize((width + 512, height)))
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(25 * seconds):
            at = number * 3 % 512
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(still[:, at : at + width]))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def pixels(path: str, seconds: int, videos: int) -> int:
    """Reads a frame a second of some videos, as training does."""
    source = [Example(str(n), path, "q", "a", None, None) for n in range(videos)]
    load = LoadClip(Sampling("uniform", num_frames=seconds), seconds, SIZE, False, "error")
    return sum(int(row["valid"].sum()) for row in clips(Videos(source), load))


def bare(path: str, seconds: int, videos: int) -> int:
    """The same frames by PyAV and PIL alone, in one thread."""
    done = 0
    for _ in range(videos):
        frames = np.zeros((seconds, SIZE, SIZE, 3), np.uint8)
        with av.open(path) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number % 25 == 12:
                    picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
                    resized = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
                    frames[number // 25] = np.asarray(resized)
                    done += 1
    return done


def main() -> None:
    kinds = dict(features=features, pixels=pixels, bare=bare, make_video=make_video)
    for line in sys.stdin:
        given = json.loads(line)
        run = kinds[given.pop("what")]
        if "directory" in given:  # a cache for each side
            given["directory"] = str(pathlib.Path(given["directory"]) / str(os.getpid()))
        core = time.process_time()
        count = run(**given)
        core = time.process_time() - core
        print(json.dumps(dict(count=count, core=core)), flush=True)


if __name__ == "__main__":
    main()
