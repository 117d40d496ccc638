"""EgoSchema (Mangalam et al., NeurIPS 2023): five choices about three minutes of daily life.

``questions.json`` as published: q_uid (the video's name, too), question, ``option 0`` to ``option
4``. ``subset_answers.json`` has the answers of 500 of them, split ``subset``; those of the others
are not published: split ``test`` has all questions, and scores those 500.
"""

from collections.abc import Sequence
from pathlib import Path

from adacm2_jax.tasks.annotation import field, read_json
from adacm2_jax.tasks.multiple_choice import both_ways, right_choice
from adacm2_jax.tasks.task import Item

FILES = ("questions.json", "subset_answers.json")


def read(directory: Path, split: str) -> Sequence[Item]:
    known = read_json(directory, "subset_answers.json", dict)
    items = []
    for number, entry in enumerate(read_json(directory, "questions.json", list)):
        name = field(entry, "q_uid", str, f"questions.json: entry {number}")
        where = f"questions.json: {name}"
        if split == "subset" and name not in known:
            continue
        choices = tuple(field(entry, f"option {i}", str, where).strip() for i in range(5))
        items.append(
            Item(
                id=name,
                video=name,
                question=field(entry, "question", str, where).strip(),
                answers=(right_choice(known[name], choices, where),) if name in known else (),
                choices=choices,
            )
        )
    return items


TASKS = both_ways("egoschema", read, ("subset", "test"), FILES)
