"""OVO-Bench (Li et al., CVPR 2025): asked at a moment of a video; what comes after is not read.

``ovo_bench_new.json`` as published: entries with id, task, video. Those about the past (EPM, ASI,
HLD) and the moment (STU, OJR, ATR, ACR, OCR, FPD) have question, options, gt (an index) and
realtime, seconds. The forward ones (REC, SSR, CRR), task ``ovo_bench_forward``, have ``test_info``:
at each realtime a count, or whether (type) the step is done or the question can be answered.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adacm2_jax.tasks.annotation import field, read_json
from adacm2_jax.tasks.ma_lmm import video_name
from adacm2_jax.tasks.multiple_choice import BRIEFLY, both_ways, right_choice, without_labels
from adacm2_jax.tasks.task import Item, Task

FILES = ("ovo_bench_new.json",)
FORWARD = ("REC", "SSR", "CRR")
_ASKED = {
    "SSR": "Is this step being done now",
    "CRR": "Does the video so far tell the answer to this question",
}


def _entries(directory: Path, forward: bool) -> list[tuple[str, str, str, Any]]:
    """(what names it in messages, task, video, entry) of those that are forward, or are not."""
    found = []
    for number, entry in enumerate(read_json(directory, FILES[0], list)):
        where = f"{FILES[0]}: entry {number}"
        task = field(entry, "task", str, where)
        if (task in FORWARD) is forward:
            found.append((where, task, video_name(field(entry, "video", str, where)), entry))
    return found


def read(directory: Path, split: str) -> Sequence[Item]:
    items = []
    for where, task, video, entry in _entries(directory, forward=False):
        choices = without_labels([str(each) for each in field(entry, "options", list, where)])
        items.append(
            Item(
                id=str(field(entry, "id", (int, str), where)),
                video=video,
                question=field(entry, "question", str, where).strip(),
                answers=(right_choice(field(entry, "gt", int, where), choices, where),),
                choices=choices,
                at=float(field(entry, "realtime", (int, float), where)),
                category=task,
            )
        )
    return items


def read_forward(directory: Path, split: str) -> Sequence[Item]:
    items = []
    for where, task, video, entry in _entries(directory, forward=True):
        for number, moment in enumerate(field(entry, "test_info", list, where)):
            if task == "REC":
                doing = field(entry, "activity", str, where).strip()
                question = f"How many times did they {doing}? Answer with a number."
                answer = str(field(moment, "count", int, where))
            else:
                about = entry if task == "CRR" else moment
                text = field(about, "question" if task == "CRR" else "step", str, where).strip()
                question = f"{_ASKED[task]}: {text} Answer with Yes or No."
                answer = "Yes" if field(moment, "type", int, where) else "No"
            at = float(field(moment, "realtime", (int, float), where))
            name = f"{field(entry, 'id', (int, str), where)}_{number}"
            items.append(Item(name, video, question, (answer,), at=at, category=task))
    return items


TASKS = (
    *both_ways("ovo_bench", read, ("test",), FILES),
    Task(
        "ovo_bench_forward", read_forward, ("test",), FILES, metrics=("stated",), generation=BRIEFLY
    ),
)
