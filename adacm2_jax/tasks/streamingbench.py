"""StreamingBench (Lin et al., 2024): questions that are asked while a video runs.

``questions_real.json`` and ``questions_omni.json`` as in the repository's ``src/data``: parts of
videos, each with questions: task_type, question, time_stamp, options, answer. What comes after the
time stamp is not read. Sound, which some of the ``omni`` questions need, never is.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from adacm2_jax.tasks.annotation import field, read_json, seconds, texts
from adacm2_jax.tasks.ma_lmm import video_name
from adacm2_jax.tasks.multiple_choice import both_ways, right_choice, without_labels
from adacm2_jax.tasks.task import Item


def read(name: str, directory: Path, split: str) -> Sequence[Item]:
    items = []
    for part, row in enumerate(read_json(directory, name, list)):
        where = f"{name}: entry {part}"
        video = video_name(field(row, "video_path", str, where))
        for number, entry in enumerate(field(row, "questions", list, where)):
            choices = without_labels(texts(entry, "options", where))
            answer = field(entry, "answer", str, where)
            items.append(
                Item(
                    id=f"{part}_{number}",
                    video=video,
                    question=field(entry, "question", str, where).strip(),
                    answers=(right_choice(answer, choices, where),),
                    choices=choices,
                    at=seconds(field(entry, "time_stamp", str, where), where),
                    category=field(entry, "task_type", str, where),
                )
            )
    return items


TASKS = tuple(
    task
    for kind in ("real", "omni")
    for name in [f"questions_{kind}.json"]
    for task in both_ways(
        f"streamingbench_{kind}", functools.partial(read, name), ("test",), (name,)
    )
)
