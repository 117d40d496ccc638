"""docs/tasks.md: its example is a task, and its tables name all there is."""

import json
import re

from adacm2_jax.commands.score import read_rows
from adacm2_jax.scoring.metrics import METRICS
from adacm2_jax.scoring.report import score, table
from adacm2_jax.tasks.task import every
from tests.small import ROOT

PAGE = (ROOT / "docs" / "tasks.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return found


def test_the_example_is_a_whole_task(tmp_path):
    code = block("python")
    assert len(code.splitlines()) < 80
    names: dict = {"__name__": "kitchen"}
    exec(compile(code, "docs/tasks.md", "exec"), names)
    (task,) = names["TASKS"]
    (tmp_path / "test.json").write_text(block("json"))
    items = task.read(tmp_path, "test")
    assert [item.video for item in items] == ["monday", "monday", "tuesday"]
    assert (items[2].start, items[2].end, items[2].answers) == (5.5, 9.0, ("cold",))
    # What a model would write: it takes the second window for warm, a little.
    log_probs = [[-1.0, -2.0, -9.0], [-3.0, -2.5, -9.0], [-5.0, -5.0, -1.0]]
    lines = [
        {
            "id": item.id,
            "group": item.video,
            "question": item.question,
            "prediction": "",
            "answer": item.answers[0],
            "choices": list(item.choices),
            "choice_log_probs": scores,
            "category": item.category,
        }
        for item, scores in zip(items, log_probs, strict=True)
    ]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = score(read_rows(str(path)), task.metrics)
    figures = found[""]["metrics"]
    assert figures["ranked"]["value"] == 2 / 3 and figures["ranked"]["macro"] == 0.75
    assert figures["ranked_by_video"]["value"] == 1 and figures["ranked_by_video"]["units"] == 2
    assert "electric" in table(found)


def test_the_page_names_every_task_and_metric():
    shown = set(re.findall(r"`(\w+)`", PAGE))
    assert {name for name in every() if not name.endswith("_ranked")} <= shown
    assert set(METRICS) <= shown
