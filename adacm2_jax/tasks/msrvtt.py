"""MSR-VTT (Xu et al., CVPR 2016), questions by Xu et al. (ACM MM 2017).

One-word answers, and captions. As MA-LMM scores answers: the first word of the best beam must be
the answer.
"""

from adacm2_jax.tasks.ma_lmm import ANSWER, DESCRIBE, QUESTION, read_captions, read_questions
from adacm2_jax.tasks.task import Task

_SPLITS = ("train", "val", "test")

TASKS = (
    Task(
        name="msrvtt_qa",
        read=read_questions,
        splits=_SPLITS,
        files=tuple(f"qa_{split}.json" for split in _SPLITS),
        prompt=QUESTION,
        metrics=("first_word", "first_word_top5"),
        generation=ANSWER,
    ),
    Task(
        name="msrvtt_captions",
        read=read_captions,
        splits=_SPLITS,
        files=tuple(f"cap_{split}.json" for split in _SPLITS),
        metrics=("captions",),
        generation=DESCRIBE,
    ),
)
