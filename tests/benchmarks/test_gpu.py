"""The measurement of a GPU, with the tiny model on whatever is here."""

import json

import pytest

from benchmarks import gpu


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    output = tmp_path_factory.mktemp("gpu")
    sections = "ceilings,stream"
    asked = ["--size", "tiny", "--seconds", "9999", "--output", str(output), "--sections", sections]
    assert gpu.main(asked) == 0
    return gpu.read_rows(output)


def test_every_row_says_what_it_was_measured_on(measured):
    assert measured
    for row in measured:
        assert row["card"] and row["platform"] and row["jax"]


def test_a_rate_is_told_with_its_share_of_the_ceiling(measured):
    product = next(row for row in measured if row["name"] == "product")
    for row in measured:
        if row["name"].startswith("ViT"):
            assert row["frames_a_second"] > 0
            assert 0 < row["share"] * product["flops_a_second"] < 1e15
    together = [row for row in measured if "of_the_vit_alone" in row]
    assert {row["name"].split(",")[0] for row in together} == {"eq8", "eq6"}


def test_what_failed_or_is_wrong_ends_with_1(tmp_path, monkeypatch, capsys):
    def one(name, seconds, size, output):
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
