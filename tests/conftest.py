"""Settings that every test shares. They must be in place before anything imports jax."""

import gc
import importlib.metadata
import importlib.util
import os
import sys
import time
from pathlib import Path

# With fewer threads than virtual devices, collectives wait for each other for ever.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Worker processes are forked after a tokenizer was used.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# Compilation makes the first example slow, so no deadline; in CI the same examples in every run.
hypothesis.settings.register_profile("default-no-deadline", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default-no-deadline")

HAS_TORCH = importlib.util.find_spec("torch") is not None
collect_ignore = [] if HAS_TORCH else ["parity"]
if importlib.util.find_spec("gguf") is None:  # `make check-real-weights` installs it
    collect_ignore.append("parity/test_real_weights.py")


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory):
    """What jax compiles is kept for the whole session, also by the processes that tests start."""
    import jax

    given = jax.config.jax_compilation_cache_dir
    jax.config.update(
        "jax_compilation_cache_dir", given or str(tmp_path_factory.mktemp("compiled"))
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


#: Of the 65,530 pieces of memory that Linux maps for a process by default; a compiled program takes
#: about six.
MANY_PIECES = 10_000


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """A process that compiles thousands of programs is let go of them in time: XLA ends it with no
    word when it gets no more memory for them."""
    yield
    if (
        "jax" in sys.modules
        and len(Path("/proc/self/maps").read_bytes().splitlines()) > MANY_PIECES
    ):
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture
def abandoned_reads(monkeypatch):
    """For tests that read a damaged checkpoint: Orbax leaves the reads beside the failed one
    unfinished. They complain when they are collected, which is to be here, not in a later test."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    yield
    for _ in range(5):  # a thread may still hold one
        gc.collect()
        time.sleep(0.1)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Where the videos of the needle task are built, once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def small_run(compiled_once, data_dir, tmp_path_factory) -> Path:
    """A finished, never interrupted run of tests/small.py. Tests must not change it."""
    from tests.small import run_script

    workdir = tmp_path_factory.mktemp("runs") / "small"
    status = run_script(
        "train.py",
        "--config=tests/small.py",
        f"--workdir={workdir}",
        f"--config.data.data_dir={data_dir}",
    )
    assert status == 0
    return workdir


#: The files that take longest begin first, or one worker waits for another's in the end.
LONGEST = (
    *("runs/test_resume.py", "parity/test_port.py", "runs/test_train.py", "data/test_prepare.py"),
    *("distributed/test_curves.py", "test_sharding.py", "distributed/test_processes.py"),
    *("parity/test_real_weights.py", "benchmarks/test_gpu.py", "data/test_epochs.py"),
    *("training/test_two_phase.py", "benchmarks/test_late_questions.py", "memory/test_fused.py"),
    *("training/test_stored.py", "data/test_workers.py", "inference/test_answerer.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {ROOT / "tests" / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_report_header() -> str:
    if HAS_TORCH:
        return f"parity: collected, torch {importlib.metadata.version('torch')} is the oracle"
    return "parity: not collected, torch is not installed (make test installs it on Python 3.11)"
