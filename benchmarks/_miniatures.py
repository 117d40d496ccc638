"""Benchmarks in miniature: annotations in their published forms, and videos of a few seconds."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from adacm2_jax.tasks.lvu import TASK_NAMES
from data.needle.render import encode

NAMES = [f"v{number}" for number in range(6)]
SECONDS = 8
_WORDS = ("tea", "milk")


def _split(entries: dict) -> dict[str, dict]:
    """Four videos to learn from, one to choose by, one to report."""
    names = list(entries)
    return {
        "train": {name: entries[name] for name in names[:4]},
        "val": {name: entries[name] for name in names[4:5]},
        "test": {name: entries[name] for name in names[5:]},
    }


def _word(number: int) -> str:
    return _WORDS[number % 2]


def _lvu() -> dict[str, dict]:
    entry = {"duration": SECONDS, "num_frames": SECONDS * 10}
    return _split(
        {
            name: entry | {task: _word(number) for task in TASK_NAMES}
            for number, name in enumerate(NAMES)
        }
    )


def _breakfast() -> dict[str, dict]:
    entries = {name: {"class_name": _word(number)} for number, name in enumerate(NAMES)}
    return {"train": _split(entries)["train"], "val": _split(entries)["test"]}


def _coin() -> dict[str, dict]:
    entries = {
        name: {
            "subset": "train" if number < 4 else "val",
            "target": f"make {_word(number)}",
            "num_frames_actual": SECONDS * 10,
            "duration": SECONDS,
        }
        for number, name in enumerate(NAMES)
    }
    return {"COIN": entries}


def _questions() -> dict[str, dict]:
    entries = {
        f"{number:07}": {
            "question": "what is made?",
            "answer": _word(number),
            "answer_type": 1,
            "video": name,
            "frame_length": SECONDS * 10,
        }
        for number, name in enumerate(NAMES)
    }
    return {f"qa_{split}": those for split, those in _split(entries).items()}


def _captions() -> dict[str, dict]:
    entries = {
        str(number): {
            "image_id": f"{name}.mp4",
            "video": f"{name}.mp4",
            "caption": f"someone makes {_word(number)}",
            "id": number,
            "frame_length": SECONDS * 10,
        }
        for number, name in enumerate(NAMES)
    }
    return {f"cap_{split}": those for split, those in _split(entries).items()}


def _steps() -> dict[str, dict]:
    entries = {
        f"{name}_0": {
            "video": name,
            "segment": f"{name}_0",
            "start_time": 1,
            "end_time": SECONDS - 1,
            "duration": SECONDS,
            "frame_length": SECONDS * 10,
            "caption": f"make {_word(number)}",
        }
        for number, name in enumerate(NAMES)
    }
    return {f"cap_{split}": those for split, those in _split(entries).items()}


def _choices() -> dict[str, list]:
    rows = [
        {
            "videoID": name,
            "duration": "short",
            "question_id": f"{number}-1",
            "question": "what is made?",
            "options": ["A. tea", "B. milk", "C. salat", "D. juice"],
            "answer": "AB"[number % 2],
        }
        for number, name in enumerate(NAMES)
    ]
    return {"video_mme": rows}


#: Configuration → its arguments after the weights up to the directories, and the annotation.
MINIATURES: dict[str, tuple[str, Callable[[], dict]]] = {
    "lvu": ("lvu_scene,", _lvu),
    "breakfast": ("", _breakfast),
    "coin": ("", _coin),
    "msrvtt_qa": ("", _questions),
    "msvd_qa": ("", _questions),
    "activitynet_qa": ("", _questions),
    "msrvtt_captions": ("", _captions),
    "msvd_captions": ("", _captions),
    "youcook2_captions": ("", _steps),
    "multiple_choice": ("video_mme,", _choices),
}


def make_videos(directory: Path) -> None:
    """All videos: a colour a second."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        rng = np.random.default_rng(number)
        grounds = rng.integers(0, 256, (SECONDS, 1, 1, 3), np.uint8)
        frames = np.broadcast_to(grounds, (SECONDS, 56, 56, 3))
        (directory / f"{name}.mp4").write_bytes(encode(frames))


def make_annotation(name: str, directory: Path) -> None:
    """The annotation of a configuration, as it is published."""
    directory.mkdir(parents=True, exist_ok=True)
    for file, content in MINIATURES[name][1]().items():
        (directory / f"{file}.json").write_text(json.dumps(content))
