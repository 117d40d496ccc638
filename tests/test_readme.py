"""What the README promises."""

import re
import shutil

import adacm2_jax
from tests.small import ROOT, quick_compilation, run_script
from tests.video.make_videos import encode, numbered_frames


def block(language: str, containing: str) -> str:
    text = (ROOT / "README.md").read_text()
    found = [
        code for code in re.findall(rf"```{language}\n(.*?)```", text, re.S) if containing in code
    ]
    assert len(found) == 1, found
    return found[0]


def as_after_the_quickstart(small_run, directory) -> None:
    (directory / "runs" / "quickstart" / "clips").mkdir(parents=True)
    shutil.copytree(small_run, directory / "runs" / "quickstart" / "main")
    for name in ("needle1", "needle2"):
        encode(directory / f"runs/quickstart/clips/{name}.mp4", numbered_frames(20), fps=2)


def test_the_snippet_in_python_answers(small_run, tmp_path, monkeypatch, capsys):
    as_after_the_quickstart(small_run, tmp_path)
    monkeypatch.chdir(tmp_path)
    code = block("python", "import adacm2_jax")
    assert len([line for line in code.splitlines() if line]) <= 5
    names: dict = {}
    with quick_compilation():
        exec(compile(code, "README.md", "exec"), names)
    reply = names["reply"]
    assert reply.frames == 10 and reply.moments
    assert capsys.readouterr().out.endswith("]\n")


def test_the_snippet_of_a_session_answers(small_run, tmp_path, monkeypatch, capsys):
    as_after_the_quickstart(small_run, tmp_path)
    monkeypatch.chdir(tmp_path)
    code = block("python", "model.session")
    assert len([line for line in code.splitlines() if line]) <= 10
    with quick_compilation():
        names: dict = {"model": adacm2_jax.load("runs/quickstart/main")}
        exec(compile(code, "README.md", "exec"), names)
        session = names["session"]
        assert len(capsys.readouterr().out.splitlines()) == 2 and session.seen == 10
        assert names["model"].resume("one.session").ask() == session.ask()


def test_the_command_answers(small_run, tmp_path, monkeypatch, capsys):
    as_after_the_quickstart(small_run, tmp_path)
    monkeypatch.chdir(tmp_path)
    command = block("", "adacm2 ask runs/quickstart").replace("\\\n", " ")
    name, *words = re.findall(r'"[^"]*"|\S+', command)
    assert name == ".venv/bin/adacm2"
    assert run_script(*(word.strip('"') for word in words)) == 0
    assert "remembered most" in capsys.readouterr().out


def test_pictures_and_pages_that_are_named_are_there():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []
