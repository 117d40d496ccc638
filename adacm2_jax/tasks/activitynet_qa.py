"""ActivityNet-QA (Yu et al., AAAI 2019): answers of one to five words, by nine kinds of question.

As MA-LMM scores it: the best beam must be the answer, the whole of it.
"""

from adacm2_jax.tasks.ma_lmm import ANSWER, QUESTION, read_questions
from adacm2_jax.tasks.task import Task

_SPLITS = ("train", "val", "test")

TASKS = (
    Task(
        name="activitynet_qa",
        read=read_questions,
        splits=_SPLITS,
        files=tuple(f"qa_{split}.json" for split in _SPLITS),
        prompt=QUESTION,
        metrics=("top1", "top5"),
        generation=ANSWER,
    ),
)
