"""The measurement of a GPU, with the tiny model on whatever is here."""

import json

import pytest

from benchmarks import gpu


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    output = tmp_path_factory.mktemp("gpu")
    asked = ["--size", "tiny", "--seconds", "9999", "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # what it takes is looked at by nobody
        assert gpu.main([*asked, "--sections", "ceilings,decode"]) == 0
    return gpu.read_rows(output)


def test_every_row_says_what_it_was_measured_on(measured):
    assert measured
    for row in measured:
        assert row["card"] and row["platform"] and row["jax"]


def test_a_rate_is_told_with_its_share_of_the_ceiling(measured):
    found = {row["name"]: row for row in measured}
    assert found["copy"]["bytes_a_second"] > 0 and found["product"]["flops_a_second"] > 0
    assert found["eight bits by XLA"]["us_a_matrix"] > 0
    decoded = [row for row in measured if "first_token_ms" in row and "torch" not in row]
    assert {row["name"] for row in decoded} >= {
        "1 rows, 1 beams",
        "1 rows, 1 beams, int8",
        "8 rows, 5 beams",
    }
    for row in decoded:
        assert row["first_token_ms"] > 0 and row["share"] is not None


def test_what_failed_or_is_wrong_ends_with_1(tmp_path, monkeypatch, capsys):
    def one(name, seconds, size, output, only):
        (output / "rows.jsonl").write_text(json.dumps({"name": name, "right": name != "runs"}))
        return 0

    monkeypatch.setattr(gpu, "run_section", one)
    for sections, expected in (("runs", 1), ("memory", 0)):
        assert gpu.main(["--output", str(tmp_path), "--sections", sections]) == expected
    assert 'wrong: {"name": "runs"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "told"),
    [(["--sections", "speed"], "no section 'speed'; there are ceilings, runs"),
     (["--seconds", "0"], "--seconds 0 must be above 0")],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(asked, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(asked)
    assert told in capsys.readouterr().err
