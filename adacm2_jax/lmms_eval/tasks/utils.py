"""What lmms-eval asks of a question that ``adacm2 questions`` wrote, and its figures."""

import os

from adacm2_jax.scoring.report import score


def show(doc: dict) -> list:
    """The video; where a part of it counts, the part, too (``adacm2_jax.lmms_eval.model``)."""
    path = os.path.abspath(doc["video"])
    part = {name: doc[name] for name in ("start", "end", "at") if doc.get(name) is not None}
    return [{"video": path} | part if part else path]


def _row(doc: dict, results: list) -> dict:
    kept = {name: doc[name] for name in ("id", "question", "group", "choices") if doc.get(name)}
    return kept | {"prediction": results[0], "answers": doc.get("answers") or [doc["answer"]]}


def process_top1(doc: dict, results: list) -> dict:
    return {"top1": _row(doc, results)}


def process_first_word(doc: dict, results: list) -> dict:
    return {"first_word": _row(doc, results)}


def process_captions(doc: dict, results: list) -> dict:
    return {"CIDEr": _row(doc, results)}


def top1(rows: list[dict]) -> float:
    return _figure(rows, "top1", "top1")


def first_word(rows: list[dict]) -> float:
    return _figure(rows, "first_word", "first_word")


def cider(rows: list[dict]) -> float:
    return _figure(rows, "captions", "CIDEr")


def _figure(rows: list[dict], metric: str, name: str) -> float:
    (found,) = score(rows, (metric,)).values()
    return found["metrics"][name]["value"]
