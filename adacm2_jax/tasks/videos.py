"""The videos of a benchmark on disk, by the names that its annotation has for them."""

from pathlib import Path

from adacm2_jax.errors import DataError, printable

#: Of files that are taken for videos.
SUFFIXES = (".mp4", ".mkv", ".avi", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv")
#: The first frame of a video that is a directory of frames, as MA-LMM has them.
FIRST_FRAME = "frame000001.jpg"


def videos_in(directory: str | Path, where: str = "videos") -> dict[str, Path]:
    """Name → video file, or directory of frames, of a directory and all below it.

    Args:
      directory: to look in.
      where: names it in messages, such as ``--videos``.

    Raises:
      DataError: if there is no such directory, or two videos have one name.
    """
    root = Path(directory)
    if not root.is_dir():
        raise DataError(f"{where} {printable(str(directory))}: no such directory")
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*")):
        if path.name == FIRST_FRAME:
            path = path.parent
            name = path.name
        elif path.suffix.lower() in SUFFIXES and path.is_file():
            name = path.stem
        else:
            continue
        if name in found:
            raise DataError(
                f"{where} {printable(str(directory))}: two videos are {printable(name)}: "
                f"{printable(str(found[name]))} and {printable(str(path))}; remove one"
            )
        found[name] = path
    return found
