"""A run or a converted checkpoint as a model of lmms-eval, in its process.

``lmms-eval --model adacm2 --model_args model=runs/mine --tasks …``: the package names this module
in its entry points (group ``lmms_eval.models``). Questions go through the evaluation that
``eval.py`` runs, so both give the same answers: videos in batches, all questions of a video in one
pass, the run's own prompt, frames and decoding, but for what the task's ``generation_kwargs`` say.

A task shows a video (``doc_to_visual``) by its path, or by a dictionary with ``video`` and, where
a part of it counts, ``start``, ``end`` or ``at`` (the question's moment), in seconds.
"""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from adacm2_jax.errors import UserError
from adacm2_jax.inference.answerer import Answerer
from adacm2_jax.inference.evaluate import answer_batches, room_for
from adacm2_jax.inference.processor import Processor
from adacm2_jax.progress import Progress
from adacm2_jax.runs.load import experiment_of, load_params, make_answerer
from adacm2_jax.video.sampling import Sampling
from adacm2_jax.video.stream import video_batches

MANIFEST = ModelManifest(model_id="adacm2", simple_class_path="adacm2_jax.lmms_eval.model.AdaCM2")

#: Of a task's ``generation_kwargs`` what decides how we decode.
_DECODING = ("max_new_tokens", "num_beams", "length_penalty", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question as ``inference.evaluate`` takes it; see ``data.jsonl.Example``."""

    id: str
    video: str
    start: float | None
    end: float | None
    question: str
    at: float | None = None
    choices: tuple[str, ...] = ()
    answer: None = None
    answers: tuple[str, ...] = ()
    group: str = ""
    category: str = ""


class AdaCM2(lmms):
    """The model.

    Args:
      model: directory of a run or of a converted checkpoint.
      policy: which memory; by default that of the run's evaluation.
      fps, num_frames: frames a second, or frames of every video; by default the run's.
      batch_size: videos that are read together.
      device, max_batch_size: of no meaning; lmms-eval gives them.
    """

    is_simple = True

    def __init__(
        self,
        model: str = "",
        policy: str = "",
        fps: float = 0,
        num_frames: int = 0,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise UserError(
                f"--model_args has {', '.join(unknown)}; known are model, policy, fps, num_frames"
            )
        if not model:
            raise UserError("--model_args needs model=DIRECTORY of a run or converted checkpoint")
        if fps and num_frames:
            raise UserError("--model_args has fps and num_frames: give one of them")
        experiment = experiment_of(model)
        data = experiment.data
        if fps:
            data = dataclasses.replace(data, sampling=Sampling(mode="fps", fps=float(fps)))
        if num_frames:
            sampling = Sampling(mode="uniform", num_frames=int(num_frames))
            data = dataclasses.replace(data, sampling=sampling)
        settings = dataclasses.replace(
            experiment.eval,
            policies=(policy,) if policy else experiment.eval.policies[:1],
            batch_size=int(batch_size),
        )
        self._experiment = dataclasses.replace(experiment, data=data, eval=settings)
        self._processor = Processor.load(Path(model), experiment.model)
        self._params = load_params(self._experiment, model)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers to requests, in their order; of one with other decoding a pass of its own."""
        answers: list[str] = [""] * len(requests)
        for options, places in _by_options(request.args[1] for request in requests).items():
            asked = []
            for place in places:
                context, _, *rest = requests[place].args
                asked.append((place, self._asked(place, context, *rest)))
            until = dict(options).get("until") or ()
            for place, line in self._evaluate(asked, self._answerer(dict(options)), "generate"):
                answers[place] = _cut(line["prediction"], until)
        self._keep("generate_until", requests, answers)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The log-probability of each text as the answer, its end token included; and whether it
        is the most probable of those that are compared, of one question about one video."""
        compared: dict[tuple, list[int]] = {}
        for place, request in enumerate(requests):
            context, _, _, doc, task, split = request.args
            compared.setdefault((task, split, doc, context), []).append(place)
        asked = []
        for places in compared.values():
            context, _, *rest = requests[places[0]].args
            texts = tuple(self._continuation(requests[place]) for place in places)
            asked.append(
                (
                    places[0],
                    dataclasses.replace(self._asked(places[0], context, *rest), choices=texts),
                )
            )
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        groups = {places[0]: places for places in compared.values()}
        for first, line in self._evaluate(asked, self._answerer({}), "likelihood"):
            log_probs = line["choice_log_probs"]
            for place, value in zip(groups[first], log_probs, strict=True):
                found[place] = value, value == max(log_probs)
        self._keep("loglikelihood", requests, found)
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise UserError("the model does not take part in tasks of several rounds")

    def _asked(self, place: int, context: str, doc_to_visual, doc: int, task: str, split: str):
        shown = doc_to_visual(self.task_dict[task][split][doc])
        if len(shown) != 1 or not isinstance(shown[0], str | Path | dict):
            raise UserError(
                f"task {task} shows {len(shown)} pictures or videos; a question needs the path of "
                "one video file. Pictures can be asked about through `adacm2 serve`"
            )
        part: dict[str, Any] = shown[0] if isinstance(shown[0], dict) else {"video": shown[0]}
        start, end, at = (part.get(name) for name in ("start", "end", "at"))
        return Asked(str(place), str(part["video"]), start, end, context.strip(), at)

    def _continuation(self, request: Any) -> str:
        _, text, _, doc, task, split = request.args
        return str(text(self.task_dict[task][split][doc]) if callable(text) else text).strip()

    def _answerer(self, options: dict[str, Any]) -> Answerer:
        chosen = {name: options[name] for name in _DECODING if options.get(name) is not None}
        if options.get("temperature") and options.get("do_sample", True):
            chosen |= {"temperature": float(options["temperature"])}
            chosen |= {"top_p": float(options.get("top_p") or 1.0)}
        if "num_beams" in chosen:  # no more answers than beams
            chosen["num_return"] = 1
        generation = dataclasses.replace(self._experiment.generation, **chosen)
        experiment = dataclasses.replace(self._experiment, generation=generation)
        return make_answerer(experiment, self._params, self._processor)

    def _evaluate(self, asked: Iterable[tuple[int, Asked]], answerer: Answerer, by: str):
        """Place and prediction of every question; a video that cannot be read ends it all."""
        examples = [example for _, example in sorted(asked, key=_by_video)]
        settings, data = self._experiment.eval, self._experiment.data
        lines: list[dict] = []
        failed: list[str] = []

        def note(example: Asked, error: str) -> None:
            failed.append(f"{example.video}: {error}")

        with Progress("evaluate", len(examples), unit="questions") as progress:
            batches = video_batches(
                examples,
                batch_size=settings.batch_size,
                room=lambda questions: room_for(settings.batch_size, questions),
                chunk=settings.chunk,
                size=self._experiment.model.vision.image_size,
                workers=settings.workers,
                on_bad_video=note,
                sampling=data.sampling,
                resize=data.resize,
                on_truncated=data.on_truncated,
                on_warning=lambda line: print(f"warning: {line}", file=sys.stderr),
            )
            answer_batches(
                answerer,
                batches,
                ask_as=data.ask,
                rows=settings.batch_size,
                text_width=answerer.text_width(data.ask(each.question) for each in examples),
                write=lambda made, _: lines.extend(made),
                failed=note,
                progress=progress,
                by=by,
                judged=False,
            )
        if failed:
            raise UserError(f"{len(failed)} question(s) cannot be answered; {failed[0]}")
        return [(int(line["id"]), line) for line in lines]

    def _keep(self, kind: str, requests: Sequence[Any], results: Sequence[Any]) -> None:
        hook = getattr(self, "cache_hook", None)
        for request, result in zip(requests, results, strict=True):
            if hook is not None:
                hook.add_partial(kind, request.args, result)


def _by_video(pair: tuple[int, Asked]) -> tuple:
    place, example = pair
    return example.video, example.start or 0.0, example.end or float("inf"), place


def _by_options(given: Iterable[dict[str, Any]]) -> dict[tuple, list[int]]:
    """Places by what their ``generation_kwargs`` hold, lists as tuples."""
    groups: dict[tuple, list[int]] = {}
    for place, options in enumerate(given):
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        groups.setdefault(tuple(sorted(plain.items(), key=str)), []).append(place)
    return groups


def _cut(text: str, until: str | Sequence[str]) -> str:
    """The text up to the first of the strings that end it."""
    for end in (until,) if isinstance(until, str) else until:
        text = text.split(end)[0] if end else text
    return text
