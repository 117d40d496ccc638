"""Breakfast (Kuehne et al., CVPR 2014): which of ten breakfasts is made, from the whole video.

Split as MA-LMM's annotation has it: persons 3 to 46 train, 47 to 54 are tested.
"""

from collections.abc import Sequence
from pathlib import Path

from adacm2_jax.tasks.annotation import field, read_json
from adacm2_jax.tasks.task import Item, Task

#: Videos that MA-LMM's loader leaves out.
LEFT_OUT = ("P28-cam01-P28_cereals", "P27-stereo-P27_milk_ch0", "P28-cam02-P28_cereals")


def read(directory: Path, split: str) -> Sequence[Item]:
    name = "train.json" if split == "train" else "val.json"
    return [
        Item(
            id=video,
            video=video,
            question="what type of breakfast is shown in the video?",
            answers=(field(entry, "class_name", str, f"{name}: {video}").strip(),),
        )
        for video, entry in read_json(directory, name, dict).items()
        if video not in LEFT_OUT
    ]


TASKS = (
    Task(
        name="breakfast",
        read=read,
        splits=("train", "test"),
        files=("train.json", "val.json"),
        metrics=("top1", "top5"),
        generation={"num_beams": 5, "num_return": 5, "max_new_tokens": 19},
    ),
)
