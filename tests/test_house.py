"""The rules of the house: who may import whom, what the library needs, what is pinned."""

import ast
import itertools
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
MAX_LINES = 450
# What users' images often lack: nothing of it is needed to import the library.
OPTIONAL = (
    "PIL array_record av fastapi gradio grain matplotlib ml_collections prometheus_client pydantic "
    "safetensors sentencepiece sklearn tensorboardX tensorflow tensorflow_datasets tokenizers "
    "torch torchvision tqdm transformers uvicorn"
).split()

SCRIPTS = ("train", "eval", "quickstart")


def project_files() -> list[Path]:
    """What git tracks or would track; outside a checkout, all but environments and caches."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode == 0:
        found = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        hidden = (".venv", ".cache", ".hypothesis", "__pycache__", "runs", "build", "dist")
        found = [
            path
            for path in ROOT.rglob("*")
            if not any(part.startswith(hidden) for part in path.relative_to(ROOT).parts)
        ]
    return sorted(path for path in found if path.is_file())


def imported_names(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, also inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update([node.module or "", *(f"{node.module}.{a.name}" for a in node.names)])
    return names


def mesh_faults(source: str) -> list[str]:
    """Uses of what jax has left behind: pjit, `with mesh:` and use_mesh."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            aliases = [part for alias in node.names for part in alias.name.split(".")]
            module = (getattr(node, "module", None) or "").split(".")
            if {"pjit", "use_mesh"} & {*aliases, *module}:
                faults.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Attribute) and node.attr in ("pjit", "use_mesh"):
            faults.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.With | ast.AsyncWith):
            for item in node.items:
                context = item.context_expr
                if isinstance(context, ast.Call):
                    called = ast.unparse(context.func).split(".")[-1]
                    wrong = called in ("make_mesh", "Mesh")
                else:
                    wrong = ast.unparse(context).split(".")[-1].endswith("mesh")
                if wrong:
                    faults.append(f"{node.lineno}: with {ast.unparse(context)}:")
    return faults


def pins(name: str) -> Iterator[Requirement]:
    for line in (ROOT / name).read_text().splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield Requirement(line)


def pinned_on(name: str, python: str) -> dict[str, str]:
    """Distribution → version, as pip on Linux with that Python would install the file."""
    here = {
        "python_version": python,
        "python_full_version": python + ".0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
    }
    found: dict[str, str] = {}
    for pin in pins(name):
        if pin.marker is None or pin.marker.evaluate(here):
            key = canonicalize_name(pin.name)
            assert key not in found, f"{name} pins {key} twice on Python {python}"
            found[key] = next(iter(pin.specifier)).version
    return found


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_imports_run_one_way():
    """The floors of the house, as pyproject.toml says them."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_no_script_imports_another_and_those_that_wire_are_short():
    for name in SCRIPTS:
        path = ROOT / f"{name}.py"
        others = {other for other in SCRIPTS if other != name}
        assert not {used.partition(".")[0] for used in imported_names(path)} & others, name
        assert name == "quickstart" or len(path.read_text().splitlines()) <= 150, name
    for path in (ROOT / "adacm2_jax").rglob("*.py"):
        used = {name.partition(".")[0] for name in imported_names(path)}
        assert not used & {*SCRIPTS, "tests", "benchmarks"}, path


def test_the_library_is_grouped():
    flat = sorted(path.name for path in (ROOT / "adacm2_jax").glob("*.py"))
    assert len(flat) <= 8, flat


def test_the_memory_is_plain_jnp():
    for path in (ROOT / "adacm2_jax" / "memory").glob("*.py"):
        assert not {"flax.linen", "flax.nnx"} & imported_names(path), path


def test_nothing_uses_the_meshes_of_old():
    found = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in project_files()
        if path.suffix == ".py"
        for fault in mesh_faults(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "faulty"),
    [
        ("from jax.experimental.pjit import pjit", True),
        ("import jax\nf = jax.experimental.pjit.pjit(g)", True),
        ("with mesh:\n    f()", True),
        ("with self.mesh:\n    f()", True),
        ("with jax.sharding.use_mesh(mesh):\n    f()", True),
        ("with jax.set_mesh(mesh):\n    f()", False),
        ("with open(path) as file:\n    f(file)", False),
    ],
)
def test_old_meshes_are_recognised(source, faulty):
    assert bool(mesh_faults(source)) is faulty


def test_the_library_imports_without_any_optional_package():
    program = f"""
        import importlib, pkgutil, sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {OPTIONAL!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Absent())

        def modules(package):
            yield package.__name__
            for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
                name = info.name.removeprefix("adacm2_jax.")
                # They need an extra: the command says which.
                needy = ("port", "video", "serving", "commands", "demo.page", "lmms_eval.model")
                if name in needy or name.endswith("__main__"):
                    continue
                module = importlib.import_module(info.name)
                if info.ispkg:
                    yield from modules(module)
                else:
                    yield info.name

        import adacm2_jax
        print(*modules(adacm2_jax))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert {"adacm2_jax", "adacm2_jax.config", "adacm2_jax.memory.slots"} <= set(
        done.stdout.split()
    )


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_are_exact_pins(name):
    loose = [
        str(pin)
        for pin in pins(name)
        if pin.url or [s.operator for s in pin.specifier] != ["=="] or "*" in str(pin.specifier)
    ]
    assert not loose, f"{name} must pin exactly: {loose}"


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_lie_within_the_ranges_of_pyproject(python):
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    for name, groups in (
        ("requirements.txt", [project["dependencies"], extras["run"], extras["video"]]),
        (
            "requirements-dev.txt",
            [project["dependencies"], *map(extras.get, ("run", "video", "plan", "test"))],
        ),
    ):
        pinned = pinned_on(name, python)
        for wanted in map(Requirement, itertools.chain(*groups)):
            if wanted.name == project["name"]:
                continue  # another of our extras
            version = pinned.get(canonicalize_name(wanted.name))
            assert version, f"{name} does not pin {wanted.name} on Python {python}"
            assert wanted.specifier.contains(version), f"{name}: {version} is outside {wanted}"


@pytest.mark.parametrize("python", PYTHONS)
def test_tests_run_with_the_versions_that_users_get(python):
    assert pinned_on("requirements.txt", python).items() <= (
        pinned_on("requirements-dev.txt", python).items()
    )


def test_the_torch_oracle_is_pinned_on_python_311_alone():
    assert [("torch" in pinned_on("requirements-dev.txt", python)) for python in PYTHONS] == [
        True,
        False,
        False,
    ]


def test_one_version_everywhere():
    import adacm2_jax

    version = pyproject()["project"]["version"]
    assert adacm2_jax.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_files_are_short_enough_to_read_in_one_sitting():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in project_files()
        if path.suffix == ".py"
    }
    long = {name: lines for name, lines in lengths.items() if lines > MAX_LINES}
    assert not long, f"longer than {MAX_LINES} lines: {long}"


def test_no_file_names_a_path_of_one_machine():
    somewhere = re.compile(rb"(?<![\w.})~-])/(?:work|tmp|root|home|Users|opt)/\w")
    found = []
    for path in project_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.decode(errors='replace').strip()}"
            for number, line in enumerate(content.splitlines(), 1)
            if somewhere.search(line)
        ]
    assert not found, "\n".join(found)
