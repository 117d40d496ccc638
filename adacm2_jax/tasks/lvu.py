"""LVU (Wu and Krähenbühl, CVPR 2021): seven classifications of film clips, each a model of its own.

As in MA-LMM: windows of 100 seconds begin every 20, the first at 0, as long as a whole one fits
into ``duration``, which leaves out what follows the scene (mostly 10 or 30 s of an end card). A
clip that is shorter than a window is read to its last frame, end card included. A clip's windows
are scored each for itself. MA-LMM's release has 8 directors and 7 writers.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from adacm2_jax.tasks.annotation import field, read_json
from adacm2_jax.tasks.task import Item, Task

TASK_NAMES = ("relationship", "way_speaking", "scene", "director", "genre", "writer", "year")
#: Seconds of a window, and between two.
WINDOW, STRIDE = 100, 20
#: A second of MA-LMM's frames.
FPS = 10


def read(name: str, directory: Path, split: str) -> Sequence[Item]:
    items = []
    for video, entry in read_json(directory, f"{split}.json", dict).items():
        if name not in entry:
            continue
        where = f"{split}.json: {video}"
        label = field(entry, name, str, where).strip()
        duration = field(entry, "duration", int, where)
        frames = field(entry, "num_frames", int, where)
        for start in starts(duration):
            items.append(
                Item(
                    id=f"{video}_{start}",
                    video=video,
                    question=f"what is the {name} of the movie?",
                    answers=(label,),
                    start=float(start),
                    end=window_end(start, frames),
                )
            )
    return items


def starts(duration: int) -> list[int]:
    """Where windows begin, seconds: at 0 always, then while a whole one fits."""
    return [0, *range(STRIDE, duration - WINDOW + 1, STRIDE)]


def window_end(start: int, frames: int) -> float:
    """Just after the window's last frame, seconds: that of its second 99, or the clip's last."""
    last = min((start + WINDOW - 1) * FPS, frames - 1)
    return (last + 1) / FPS


TASKS = tuple(
    Task(
        name=f"lvu_{name}",
        read=functools.partial(read, name),
        splits=("train", "val", "test"),
        files=("train.json", "val.json", "test.json"),
        metrics=("top1", "top5", "top1_by_video"),
        generation={"num_beams": 5, "num_return": 5, "max_new_tokens": 4},
    )
    for name in TASK_NAMES
)
