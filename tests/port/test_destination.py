"""Where a conversion goes: found to be usable before anything is computed, whole or not there."""

import numpy as np
import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.port.exporter import export_checkpoint
from adacm2_jax.port.importer import import_checkpoint
from adacm2_jax.port.store import open_ours
from adacm2_jax.runs.checkpoint import Checkpoints
from adacm2_jax.runs.workdir import find_base, param_trees, write_link

NOWHERE = "a-source-that-is-not-there"


def test_paths_may_go_up_and_hold_any_character(hugging_face, tensors, tmp_path, monkeypatch):
    """Orbax and tensorstore take no ``..``, and read an address in ``#``, ``?`` and ``%41``."""
    tmp_path = tmp_path / "a #1?%41"
    (tmp_path / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "inside")
    import_checkpoint([hugging_face], "../weights")
    _, params = open_ours("../weights")
    expected = tensors["language_projection.weight"].T
    np.testing.assert_array_equal(params.read("language_projection/kernel"), expected)
    export_checkpoint("../inside/../weights", "../back", "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "inside", "weights"]
    # A run finds its base from wherever a command is started.
    (tmp_path / "run").mkdir()
    write_link("../run", "../weights")
    monkeypatch.chdir(tmp_path)
    assert find_base("run") == tmp_path / "weights"
    assert param_trees("inside/../weights") == [tmp_path / "weights" / "params"]
    Checkpoints("inside/../run").close()
    assert (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", r"--dst .*file is a file; name a directory"),
        ("file/ours", r"--dst .*: nothing can be written to .*file \(Not a directory\); name"),
        ("file/a/b", r"--dst .*: nothing can be written to .*file \(Not a directory\); name"),
        ("/proc/ours", r"--dst /proc/ours: nothing can be written to /proc \("),
    ],
)
def test_what_cannot_be_written_is_refused_before_a_source_is_opened(tmp_path, place, message):
    (tmp_path / "file").write_text("precious")
    for force in (False, True):
        with pytest.raises(UserError, match=message):
            import_checkpoint([NOWHERE], tmp_path / place, force=force)
        with pytest.raises(UserError, match=message):
            export_checkpoint(NOWHERE, tmp_path / place, "hf", force=force)
    assert (tmp_path / "file").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_source_is_not_replaced_by_what_is_made_of_it(hugging_face, tmp_path):
    for place in (hugging_face, hugging_face.parent):
        with pytest.raises(UserError, match=r"would replace --src .*blip; name another directory"):
            import_checkpoint([hugging_face], place, force=True)
    import_checkpoint([hugging_face], tmp_path / "weights")
    with pytest.raises(UserError, match="would replace --src"):
        export_checkpoint(tmp_path / "weights", tmp_path / "weights", "hf", force=True)
    assert (tmp_path / "weights" / "base.json").is_file()


def test_a_link_as_destination_stays_one(hugging_face, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "weights").symlink_to(tmp_path / "disk")
    import_checkpoint([hugging_face], tmp_path / "weights", force=True)
    assert (tmp_path / "weights").is_symlink()
    assert (tmp_path / "disk" / "base.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "weights"]
