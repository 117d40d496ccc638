"""What several annotations of MA-LMM (He et al., CVPR 2024) share: their cleaning, and their form.

Its ``data/<name>/annotation/`` holds questions (``qa_<split>.json``) and captions
(``cap_<split>.json``), each an object of id → entry.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from adacm2_jax.tasks.annotation import field, read_json
from adacm2_jax.tasks.task import Item, Task

#: How questions are put to both networks.
QUESTION = "Question: {question} Short answer:"
#: What a caption answers.
CAPTION = "what does the video describe?"
#: Generation of its classification, questions and captions: HF's ``max_length`` counts one more.
CLASSIFY = {"num_beams": 5, "num_return": 5, "max_new_tokens": 19}
ANSWER = {"num_beams": 5, "num_return": 5, "max_new_tokens": 9, "length_penalty": 0.0}
DESCRIBE = {"num_beams": 5, "max_new_tokens": 49}

_CLEANED = re.compile(r"[.!\"()*#:;~]")
_MOST_WORDS = 50


def clean_caption(text: str) -> str:
    """Lower case, ``.!"()*#:;~`` as spaces, runs of white space as one, at most 50 words."""
    text = re.sub(r"\s{2,}", " ", _CLEANED.sub(" ", text.lower())).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:_MOST_WORDS])


def clean_question(text: str) -> str:
    """Lower case, without ``.!"()*#:;~``, at most 50 words; a question mark stays."""
    text = _CLEANED.sub("", text.lower()).rstrip(" ")
    return " ".join(text.split(" ")[:_MOST_WORDS])


def read_questions(directory: Path, split: str) -> Sequence[Item]:
    """``qa_<split>.json``. Answers to learn are cleaned like questions, those to score are not."""
    name = f"qa_{split}.json"
    items = []
    for key, entry in read_json(directory, name, dict).items():
        where = f"{name}: {key}"
        answer = field(entry, "answer", str, where)
        category = entry.get("answer_type", "")
        items.append(
            Item(
                id=key,
                video=video_name(field(entry, "video", str, where)),
                question=clean_question(field(entry, "question", str, where)),
                answers=(clean_question(answer) if split == "train" else answer.strip(),),
                category=str(category),
            )
        )
    return items


def read_captions(directory: Path, split: str) -> Sequence[Item]:
    """``cap_<split>.json``: to learn, an item a caption; else one a video, with all captions."""
    name = f"cap_{split}.json"
    items: list[Item] = []
    captions: dict[str, list[str]] = {}
    for key, entry in read_json(directory, name, dict).items():
        where = f"{name}: {key}"
        video = video_name(field(entry, "video", str, where))
        caption = field(entry, "caption", str, where)
        captions.setdefault(video, []).append(caption)
        items.append(Item(key, video, CAPTION, (clean_caption(caption),)))
    if split == "train":
        return items
    return [Item(video, video, CAPTION, tuple(texts)) for video, texts in captions.items()]


def video_name(text: str) -> str:
    """A video's name without its directory and suffix; names of YouTube may hold dots."""
    name = text.rsplit("/", 1)[-1]
    return re.sub(r"\.(mp4|avi|mkv|webm|mov)$", "", name, flags=re.IGNORECASE)


def words_and_captions(name: str) -> tuple[Task, Task]:
    """``NAME_qa``, whose answers are a word, and ``NAME_captions``, of the same videos."""
    splits = ("train", "val", "test")
    return (
        Task(
            name=f"{name}_qa",
            read=read_questions,
            splits=splits,
            files=tuple(f"qa_{split}.json" for split in splits),
            prompt=QUESTION,
            metrics=("first_word", "first_word_top5"),
            generation=ANSWER,
        ),
        Task(
            name=f"{name}_captions",
            read=read_captions,
            splits=splits,
            files=tuple(f"cap_{split}.json" for split in splits),
            metrics=("captions",),
            generation=DESCRIBE,
        ),
    )
