"""YouCook2 (Zhou et al., AAAI 2018): what is done in one step of a recipe, described.

``cap_<split>.json`` as in MA-LMM; only the step's part of the video is read. The captions of the
test split are not published: theirs are empty, and it is not scored.
"""

from collections.abc import Sequence
from pathlib import Path

from adacm2_jax.tasks.annotation import field, read_json
from adacm2_jax.tasks.ma_lmm import CAPTION, DESCRIBE, clean_caption, video_name
from adacm2_jax.tasks.task import Item, Task


def read(directory: Path, split: str) -> Sequence[Item]:
    name = f"cap_{split}.json"
    items = []
    for segment, entry in read_json(directory, name, dict).items():
        where = f"{name}: {segment}"
        start, end, duration = (
            float(field(entry, each, (int, float), where))
            for each in ("start_time", "end_time", "duration")
        )
        caption = field(entry, "caption", str, where).strip()
        if split == "train":
            caption = clean_caption(caption)
        items.append(
            Item(
                id=segment,
                video=video_name(field(entry, "video", str, where)),
                question=CAPTION,
                answers=(caption,) if caption else (),
                start=max(0.0, start),
                end=min(duration, end),
            )
        )
    return items


TASKS = (
    Task(
        name="youcook2_captions",
        read=read,
        splits=("train", "val", "test"),
        files=("cap_train.json", "cap_val.json", "cap_test.json"),
        metrics=("captions",),
        generation=DESCRIBE | {"max_new_tokens": 29, "min_new_tokens": 1},
    ),
)
