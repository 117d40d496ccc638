"""The trace that ``train.py --profile`` writes."""

import gzip
import json

from adacm2_jax.runs.profiling import Profile
from tests.small import arguments, run_script


def test_a_profile_has_the_asked_steps_after_the_first_two(
    compiled_once, data_dir, tmp_path, capsys
):
    options = arguments(tmp_path, data_dir, train__steps=5, eval__limit=1)
    assert run_script("train.py", *options, "--profile=2") == 0
    profile = tmp_path / "profile"
    assert f"profile written to {profile}" in capsys.readouterr().err
    assert len(list(profile.rglob("*.xplane.pb"))) == 1
    [trace] = profile.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert sorted(map(int, steps)) == [3, 4]


def test_a_run_that_ends_before_the_profile_begins_says_so(tmp_path, capsys):
    profile = Profile(tmp_path, 1)
    profile.begin_step(8)
    profile.begin_step(9)
    profile.close()
    assert "warning: no profile" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()
    Profile(tmp_path, 0).close()
    assert capsys.readouterr().err == ""
