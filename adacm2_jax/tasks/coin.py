"""COIN (Tang et al., CVPR 2019): which of 180 activities is shown, from the whole video.

``COIN.json`` as MA-LMM changed the official one: the label is in ``target``, and videos that could
not be had lack ``num_frames_actual``.
"""

from collections.abc import Sequence
from pathlib import Path

from adacm2_jax.tasks.annotation import field, read_json
from adacm2_jax.tasks.ma_lmm import CLASSIFY
from adacm2_jax.tasks.task import Item, Task

#: Videos that MA-LMM's loader leaves out.
LEFT_OUT = ("AfiVmAjfTNs", "cjwtcDKTQM8")


def read(directory: Path, split: str) -> Sequence[Item]:
    subset = "train" if split == "train" else "val"
    return [
        Item(
            id=video,
            video=video,
            question="what is the activity in the video?",
            answers=(field(entry, "target", str, f"COIN.json: {video}").strip(),),
        )
        for video, entry in read_json(directory, "COIN.json", dict).items()
        if field(entry, "subset", str, f"COIN.json: {video}") == subset
        and video not in LEFT_OUT
        and "num_frames_actual" in entry
    ]


TASKS = (
    Task(
        name="coin",
        read=read,
        splits=("train", "test"),
        files=("COIN.json",),
        metrics=("top1", "top5"),
        generation=CLASSIFY,
    ),
)
