"""Captions by pycocoevalcap: BLEU, METEOR, ROUGE_L and CIDEr, as the COCO evaluation has them.

METEOR and the tokenizer are Java programs that it brings along.
"""

import collections
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from adacm2_jax.errors import UserError
from adacm2_jax.scoring.intervals import mean_interval, numbered, resampled
from adacm2_jax.scoring.metrics import Figure, Row, answers_of, video_of

#: A tokenised text, or several, by the caption's number.
Texts = Mapping[int, list[str]]


def caption_figures(rows: Sequence[Row], seed: int = 0) -> dict[str, Figure]:
    """All figures of captions; their sum is what MA-LMM chooses a checkpoint by, with BLEU_4 alone.

    Raises:
      UserError: without pycocoevalcap or Java; says what to install.
    """
    check_installed()
    check_java()
    written = {i: [row["prediction"]] for i, row in enumerate(rows)}
    references = {i: answers_of(row) for i, row in enumerate(rows)}
    groups, _ = numbered([video_of(row) for row in rows])
    texts = tokenised(references), tokenised(written)
    return score_tokenised(*texts, groups, seed) | {"METEOR": _meteor(*texts, groups, seed)}


def check_installed() -> None:
    """Looks for pycocoevalcap.

    Raises:
      UserError: if it is not there.
    """
    try:
        import pycocoevalcap  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            "captions are scored by pycocoevalcap, which is not installed: pip install "
            "'adacm2-jax[captions]'"
        ) from None


def check_java() -> None:
    """Looks for Java.

    Raises:
      UserError: if there is none that runs.
    """
    java = shutil.which("java")
    done = java and subprocess.run([java, "-version"], capture_output=True, timeout=60)
    if not done or done.returncode:
        raise UserError(
            "captions need Java 8 or newer, for METEOR and the tokenizer: install a runtime "
            "(Debian: apt install default-jre-headless) so that `java -version` runs"
        )


def tokenised(texts: Texts) -> Texts:
    """By the tokenizer of the Penn Treebank, in lower case and without punctuation."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # A line a text: whatever else ends a line would shift those that follow. METEOR parts by |||.
    clean = {
        key: [{"caption": " ".join(text.replace("|||", " ").split())} for text in several]
        for key, several in texts.items()
    }
    found = PTBTokenizer().tokenize(clean)
    if {key: len(several) for key, several in found.items()} != {
        key: len(several) for key, several in texts.items()
    }:
        raise UserError("the tokenizer of captions lost some: is Java out of memory?")
    return found


def score_tokenised(
    references: Texts, written: Texts, groups: np.ndarray, seed: int = 0
) -> dict[str, Figure]:
    """BLEU, ROUGE_L and CIDEr, which need no Java.

    Args:
      references: several a caption.
      written: one each, with the same numbers from 0 on.
      groups: int64[n], the video of each.
      seed: of the resampling.
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    figures = _bleu(references, written, groups, seed)
    for name, scorer in (("ROUGE_L", Rouge()), ("CIDEr", Cider())):
        value, each = scorer.compute_score(references, written)
        interval = mean_interval(np.asarray(each, np.float64), groups, seed)
        figures[name] = Figure(float(value), interval, len(written), _count(groups))
    return figures


def _bleu(references: Texts, written: Texts, groups: np.ndarray, seed: int) -> dict[str, Figure]:
    """Of the whole corpus: the counts of the captions are summed before anything is divided."""
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    counts = []
    for key, (text,) in written.items():
        cooked = cook_test(text, cook_refs(references[key]), eff="closest")
        counts.append([*cooked["correct"], *cooked["guess"], cooked["testlen"], cooked["reflen"]])
    figures = {}
    for order in range(1, 5):

        def value(sums: np.ndarray, order: int = order) -> np.ndarray:
            # The smallest numbers are pycocoevalcap's own: nothing is divided by zero.
            ratios = (sums[:, :order] + 1e-15) / (sums[:, 4 : 4 + order] + 1e-9)
            ratio = (sums[:, 8] + 1e-15) / (sums[:, 9] + 1e-9)
            return ratios.prod(1) ** (1 / order) * np.exp(np.minimum(0, 1 - 1 / ratio))

        figures[f"BLEU_{order}"] = _of_sums(np.array(counts, np.float64), value, groups, seed)
    return figures


def _of_sums(
    counts: np.ndarray, value: Callable[[np.ndarray], np.ndarray], groups: np.ndarray, seed: int
) -> Figure:
    """A figure that is a function of counts, float64[n, k], summed over all captions."""
    videos = _count(groups)
    sums = np.zeros((videos, counts.shape[1]))
    np.add.at(sums, groups, counts)
    (point,) = value(counts.sum(0, keepdims=True))
    interval = (
        resampled(lambda weights: value(weights @ sums), videos, seed) if videos > 1 else None
    )
    return Figure(float(point), interval, len(counts), videos)


def _meteor(references: Texts, written: Texts, groups: np.ndarray, seed: int) -> Figure:
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    try:
        stats = [meteor._stat(text, references[key]) for key, (text,) in written.items()]
        counts = np.array([list(map(float, line.split())) for line in stats])

        def value(sums: np.ndarray) -> np.ndarray:
            return np.array([_meteor_of(meteor, line) for line in sums])

        return _of_sums(counts, value, groups, seed)
    except (OSError, ValueError):
        raise UserError(
            "METEOR ended before its time: is Java out of memory? It takes 2 GB"
        ) from None


def _meteor_of(meteor: Any, sums: np.ndarray) -> float:
    """METEOR of summed counts."""
    process = meteor.meteor_p
    process.stdin.write(f"EVAL ||| {' '.join(map(str, sums))}\n".encode())
    process.stdin.flush()
    process.stdout.readline()  # of the one entry; the next is of all entries
    return float(process.stdout.readline())


def _count(groups: np.ndarray) -> int:
    return len(collections.Counter(groups.tolist()))
