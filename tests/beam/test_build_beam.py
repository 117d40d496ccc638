"""A benchmark built by Beam's direct runner is the one that is built here, byte by byte."""

import pytest

from data.benchmark import build as builder
from tests.data.test_benchmark import build, lvu  # noqa: F401


def files(root):
    return {path.name: path.read_bytes() for path in sorted(root.iterdir())}


@pytest.fixture(scope="module")
def here(lvu, tmp_path_factory):  # noqa: F811
    return build(lvu, tmp_path_factory.mktemp("here"))


def test_the_pipeline_builds_what_is_built_here(lvu, here, tmp_path):  # noqa: F811
    built = build(lvu, tmp_path, runner="direct", beam=["direct_num_workers=2"])
    assert files(built) == files(here)


def test_shards_that_are_there_stay(lvu, here, tmp_path):  # noqa: F811
    built = build(lvu, tmp_path, splits=("test",))
    first = min(built.glob("lvu_scene-*.array_record-*"))
    written = {path: path.stat().st_mtime_ns for path in built.glob("lvu_scene-*.array_record-*")}
    first.unlink()
    again = build(lvu, tmp_path, splits=("test",), runner="direct")
    changed = [path for path, time in written.items() if path.stat().st_mtime_ns != time]
    assert again == built and changed == [first]
    assert first.read_bytes() == (here / first.name).read_bytes()


def test_a_runner_that_beam_does_not_have(lvu, tmp_path, capsys):  # noqa: F811
    command = ["lvu_scene", f"--annotations={lvu}", f"--videos={lvu}/videos"]
    assert builder.main([*command, f"--data-dir={tmp_path}", "--runner=Nowhere"]) == 2
    assert "--runner=Nowhere: " in capsys.readouterr().err
