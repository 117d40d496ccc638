"""Video-MME (Fu et al., CVPR 2025): four choices about videos of 11 seconds to an hour.

Read is what is published: the table (``test-00000-of-00001.parquet``, or the same rows as JSON or
JSON lines), whose videos are named by ``videoID``; or the nested form of the repository's
``output_test_template.json``. Reported by length: short, medium, long.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adacm2_jax.tasks.annotation import field, read_rows, texts
from adacm2_jax.tasks.multiple_choice import both_ways, right_choice, without_labels
from adacm2_jax.tasks.task import Item

FILES = (
    "video_mme.json",
    "video_mme.jsonl",
    "test-00000-of-00001.parquet",
    "output_test_template.json",
)


def read(directory: Path, split: str) -> Sequence[Item]:
    name, rows = read_rows(directory, FILES)
    items = []
    for number, row in enumerate(rows):
        for video, length, entry in _questions(row, f"{name}: entry {number}"):
            where = f"{name}: {video}"
            options = "options" if "options" in entry else "choices"
            choices = without_labels(texts(entry, options, where))
            answer = entry.get("answer")
            items.append(
                Item(
                    id=field(entry, "question_id", str, where),
                    video=video,
                    question=field(entry, "question", str, where).strip(),
                    answers=(right_choice(answer, choices, where),) if answer else (),
                    choices=choices,
                    category=length,
                )
            )
    return items


def _questions(row: Any, where: str) -> Iterator[tuple[str, str, dict]]:
    """(video, length, its question) of a row of the table, or of a nested entry."""
    if "questions" in row:
        for entry in field(row, "questions", list, where):
            length = field(row, "duration_category", str, where)
            yield field(row, "video_id", str, where), length, entry
    else:
        yield field(row, "videoID", str, where), field(row, "duration", str, where), row


TASKS = both_ways("video_mme", read, ("test",), FILES)
