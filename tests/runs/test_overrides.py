"""Values of overrides that no run can have: one line with field, value and remedy, and no files."""

import pytest

from tests.small import arguments, error_line, run_script

#: Field, value as it is typed, words of the message beside both.
REFUSED = [
    ("data.sampling.fps", "nan", ["finite"]),
    ("data.sampling.fps", "-1", ["sampling.fps=-1.0", "positive"]),
    ("data.sampling.num_frames", "-3", ["sampling.num_frames=-3", "1 or more"]),
    ("data.sampling.max_frames", "-2", ["sampling.max_frames=-2", "1 or more"]),
    ("data.prompt", "{question:99999999999}", ["only field is {question}"]),
    ("data.prompt", "{question[a]}", ["only field is {question}"]),
    ("data.prompt", "{question.__class__}", ["only field is {question}"]),
    ("data.prompt", "{question!r}", ["only field is {question}"]),
    ("data.prompt", "{question", ["only field is {question}", "braces twice"]),
    ("data.prompt", "{}", ["only field is {question}"]),
    ("data.workers", "10000", ["at most 256"]),
    ("data.needle.train_size", "-1", ["at least 0"]),
    ("eval.workers", "1000000", ["at most 256"]),
    ("eval.full_frames", "-1", ["at least 0"]),
    ("generation.temperature", "nan", ["finite"]),
    ("model.memory.recent_ratio", "1e999999999", ["'1e999999999'", "1/10"]),
    ("model.memory.novelty", "nan", ["finite"]),
    ("model.vision.width", "0", ["at least 1"]),
    ("model.vision.patch_size", "0", ["at least 1"]),
    ("model.vision.layer_norm_eps", "0", ["above 0"]),
    ("model.qformer.num_queries", "0", ["at least 1"]),
    ("model.qformer.dropout", "1", ["[0, 1)"]),
    ("model.llm.depth", "-1", ["at least 1"]),
    ("model.llm.rope_theta", "0", ["above 0"]),
    ("model.llm.rope_theta", "inf", ["finite"]),
    ("model.max_text_len", "0", ["at least 1"]),
    ("model.max_answer_len", "0", ["at least 1"]),
    ("optim.learning_rate", "nan", ["finite"]),
    ("optim.clip_norm", "inf", ["finite"]),
    ("optim.b1", "1", ["[0, 1)"]),
    ("optim.groups", "(('(',1.0),)", ["'('", "regular expression"]),
    ("optim.groups", "(('.*',),)", ["('.*',)", "pair"]),
    ("optim.groups", "((1,2),)", ["regular expression"]),
    ("optim.groups", "(('.*','fast'),)", ["'fast'", "number from 0"]),
    ("optim.groups", "(('.*',-1.0),)", ["-1.0", "number from 0"]),
    ("init_missing", "('(',)", ["'('", "regular expression"]),
    ("seed", "-1", ["at least 0"]),
    ("seed", "4294967296", ["at most 4,294,967,295"]),
    ("mesh", "('a','b')", ["('a', 'b')", "two whole numbers"]),
    ("mesh", "(1,)", ["(1,)", "two whole numbers"]),
    ("mesh", "()", ["()", "two whole numbers"]),
    ("mesh", "(1,1,1)", ["(1, 1, 1)", "two whole numbers"]),
    ("mesh", "(1.0,1)", ["(1.0, 1)", "two whole numbers"]),
]


@pytest.mark.parametrize(("field", "value", "words"), REFUSED, ids=lambda given: str(given)[:40])
def test_an_override_that_cannot_be_is_refused_before_anything_is_written(
    field, value, words, tmp_path, capsys
):
    command = arguments(tmp_path / "run", tmp_path / "data", **{field: value})
    assert run_script("train.py", *command) == 2
    line = error_line(capsys)
    assert field.removeprefix("model.").removeprefix("data.").rpartition(".")[2] in line, line
    for word in words:
        assert word in line, line
    assert not list(tmp_path.iterdir())
