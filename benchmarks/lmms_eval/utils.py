"""What lmms-eval shows of a clip of the needle task."""

from PIL import Image


def video(doc: dict) -> list:
    return [doc["video"]]


def frames(doc: dict) -> list:
    return [Image.open(path) for path in doc["frames"]]
