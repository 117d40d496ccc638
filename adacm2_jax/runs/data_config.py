"""What an experiment reads: the part ``data`` of it."""

import dataclasses
import string

from adacm2_jax.config import check_numbers
from adacm2_jax.errors import UserError
from adacm2_jax.video.sampling import RESIZE_NAMES, Sampling

#: Decoding processes or threads: beyond any machine, but few enough to be started.
WORKERS = {"workers": 256}
#: As many decoding processes as suit the machine.
AUTO = -1


@dataclasses.dataclass(frozen=True)
class NeedleTask:
    """The generated needle task.

    Attributes:
      num_frames: of a video.
      train_size: videos to train on.
      test_size: videos to evaluate on.
      evidence_only: only the frame that answers is read.
      drawn: training clips are drawn when they are read, instead of stored as videos.
    """

    num_frames: int = 4
    train_size: int = 8000
    test_size: int = 1000
    evidence_only: bool = False
    drawn: bool = False

    def __post_init__(self):
        check_numbers("data.needle", self, train_size=0, test_size=0)


@dataclasses.dataclass(frozen=True)
class SuiteTasks:
    """The generated suite (``data/suite``).

    Attributes:
      tasks: what is asked; training clips take turns, and one given twice is seen twice as often.
      styles: how videos look; each task is in each.
      num_frames: of a video.
      train_size: clips to train on, which are drawn when they are read.
      test_size: videos to evaluate on, of each task in each style; of ``val`` as many.
      questions_per_video: of those videos, at most.
      needle_frames: frames of a shot that is asked about; 0: the style's own.
      ages: least and most frames after what is asked about, in the videos to evaluate on; empty:
        any.
      share: of a frame's side that a digit takes; 0: the style's own.
      seed: another one gives other videos.
    """

    tasks: tuple = ("needle", "order", "count", "change")
    styles: tuple = ("grounds",)
    num_frames: int = 16
    train_size: int = 8000
    test_size: int = 250
    questions_per_video: int = 4
    needle_frames: int = 0
    ages: tuple = ()
    share: float = 0.0
    seed: int = 0

    def __post_init__(self):
        check_numbers(
            "data.suite", self, train_size=0, test_size=0, needle_frames=0, share=0, seed=0
        )
        for field, example in (("tasks", "needle"), ("styles", "grounds")):
            names = getattr(self, field)
            if not names or not all(isinstance(name, str) for name in names):
                raise UserError(
                    f"data.suite.{field} = {names!r:.60} must be names, such as ({example!r},)"
                )
        if any(type(age) is not int for age in self.ages):
            raise UserError(f"data.suite.ages = {self.ages!r:.60} must be whole numbers")


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A benchmark (``adacm2_jax.tasks``).

    Attributes:
      name: of the task, such as ``lvu_scene``.
      annotations: directory of its annotation, as published.
      videos: directory of its videos, or of their frames.
      built: directory that ``python -m data.benchmark.build`` made: it is read instead.
      allow_missing: leave out what is asked of videos that are not there.
    """

    name: str = ""
    annotations: str = ""
    videos: str = ""
    built: str = ""
    allow_missing: bool = False


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how.

    Attributes:
      source: ``jsonl``, ``task``, ``needle`` or ``suite``.
      jsonl: by split, JSON-lines files with video, question, answer and optional start, end
        (seconds).
      task: a benchmark, from its annotation or built.
      needle: of the generated task.
      suite: of the generated tasks.
      data_dir: where prepared data sets are written.
      prompt: what both language networks are asked; ``{question}`` stands for the question.
      sampling: which frames are taken of a video.
      jitter: training: a random instant in each segment.
      resize: ``clean``, or ``ma_lmm``: as MA-LMM evaluates, see adacm2_jax/video/resize.py.
      on_truncated: of a file that is cut short: ``error``, or ``use`` what could be read.
      cache: keep decoded training clips on disk (short videos, many epochs).
      cache_dir: where.
      features: a directory of ``adacm2 prepare``: its features are read instead of training clips.
      features_local: a directory of this machine (a disk, or /dev/shm) where frames of ``features``
        are kept once they have been read; empty: none.
      workers: decoding processes in training; 0 decodes in threads, -1 has as many as suit the
        machine's cores and memory and the size of the videos.
    """

    source: str = "jsonl"
    jsonl: dict = dataclasses.field(default_factory=lambda: {"train": "", "test": ""})
    task: TaskData = TaskData()
    needle: NeedleTask = NeedleTask()
    suite: SuiteTasks = SuiteTasks()
    data_dir: str = "runs/data"
    prompt: str = "{question}"
    sampling: Sampling = dataclasses.field(default=Sampling(mode="uniform", num_frames=8))
    jitter: bool = False
    resize: str = "clean"
    on_truncated: str = "error"
    cache: bool = False
    cache_dir: str = "runs/cache"
    features: str = ""
    features_local: str = ""
    workers: int = 0

    def __post_init__(self):
        check_numbers("data", self, WORKERS, workers=AUTO)
        try:
            fields = [each[1:] for each in string.Formatter().parse(self.prompt)]
        except ValueError:
            fields = [("", "", None)]
        if not {each for each in fields if each[0] is not None} <= {("question", "", None)}:
            raise UserError(
                f"data.prompt = {self.prompt!r}: its only field is {{question}}; write other "
                "braces twice"
            )
        for split, path in self.jsonl.items():
            if not isinstance(split, str) or not isinstance(path, str):
                raise UserError(f"data.jsonl.{split} = {path!r:.60} must be the name of a file")
        if self.on_truncated not in ("error", "use"):
            raise UserError(f"data.on_truncated = {self.on_truncated!r}: must be error or use")
        if self.resize not in RESIZE_NAMES:
            raise UserError(f"data.resize = {self.resize!r}: must be {' or '.join(RESIZE_NAMES)}")
        if self.features and self.cache:
            raise UserError(
                f"data.features = {self.features} and data.cache: decoded clips would not be "
                "read; unset one"
            )

    def ask(self, question: str) -> str:
        """What both language networks read of a question."""
        return self.prompt.format(question=question)
