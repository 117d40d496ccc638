"""MLVU (Zhou et al., CVPR 2025): seven kinds of questions with choices about long videos.

The files of its ``json`` directory, each a list of video, question, candidates, answer (the text of
one candidate) and question_type. Files that are not there are passed over, one must be. The two
kinds that are answered in free text, sub-scene and summary, are judged by a language model and not
read. M-Avg is the mean of the kinds, ``macro`` in the results.
"""

from collections.abc import Sequence
from pathlib import Path

from adacm2_jax.tasks.annotation import field, read_json, read_rows, texts
from adacm2_jax.tasks.ma_lmm import video_name
from adacm2_jax.tasks.multiple_choice import both_ways, right_choice, without_labels
from adacm2_jax.tasks.task import Item

FILES = (
    "1_plotQA.json",
    "2_needle.json",
    "3_ego.json",
    "4_count.json",
    "5_order.json",
    "6_anomaly_reco.json",
    "7_topic_reasoning.json",
)


def read(directory: Path, split: str) -> Sequence[Item]:
    there = [name for name in FILES if (directory / name).exists()]
    if not there:
        read_rows(directory, FILES)  # says so
    items = []
    for name in there:
        for number, entry in enumerate(read_json(directory, name, list)):
            where = f"{name}: entry {number}"
            choices = without_labels(texts(entry, "candidates", where))
            answer = field(entry, "answer", str, where)
            items.append(
                Item(
                    id=f"{name.removesuffix('.json')}_{number}",
                    video=video_name(field(entry, "video", str, where)),
                    question=field(entry, "question", str, where).strip(),
                    answers=(right_choice(answer, choices, where),),
                    choices=choices,
                    category=field(entry, "question_type", str, where),
                )
            )
    return items


TASKS = both_ways("mlvu", read, ("test",), FILES)
