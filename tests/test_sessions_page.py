"""The snippets of docs/sessions.md run, one after the other."""

import re
import shutil

import numpy as np

from tests.small import ROOT, quick_compilation
from tests.video.make_videos import encode, numbered_frames


def test_the_snippets_run_in_order(small_run, tmp_path, monkeypatch, capsys):
    clips = tmp_path / "runs" / "quickstart" / "clips"
    clips.mkdir(parents=True)
    shutil.copytree(small_run, tmp_path / "runs" / "quickstart" / "main")
    encode(clips / "needle1.mp4", numbered_frames(20), fps=2)
    encode(clips / "needle2.mp4", numbered_frames(3), fps=1)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "sessions.md").read_text(), re.S)
    assert len(blocks) == 6
    names: dict = {}
    with quick_compilation():
        for code in blocks:
            exec(compile(code, "docs/sessions.md", "exec"), names)
    assert names["session"].seen == names["other"].seen == 10 and names["watch"].seen == 3
    np.testing.assert_array_equal(names["state"].seen, [16, 9])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(f"10 frames, {names['session'].size} bytes")
    assert lines[-1] == "[16  9]"
