"""A run is the same on one device, on eight, and in two processes; also across its checkpoints."""

import os

import numpy as np
import pytest

from tests.distributed.conftest import run_curves
from tests.distributed.curves import STEPS

#: One mesh, and with ``make check-curves`` all: every one compiles for itself in every process.
MESHES = ((8, 1), (4, 2), (2, 4)) if os.environ.get("ALL_MESHES") else ((4, 2),)


@pytest.fixture(scope="module")
def curves(compiled_once, tmp_path_factory) -> dict:
    """Losses by where they were computed."""
    path = tmp_path_factory.mktemp("curves")
    found = {}

    def run(processes: int, jobs: dict, **options) -> None:
        results = run_curves(path, processes, list(jobs.values()), **options)
        found.update(zip(jobs, results, strict=True))

    one, by_two = {"shape": (1, 1)}, str(path / "by_two")
    run(
        1,
        {"one": one, "ulp": one | {"ulp": True}}
        | {("eight", shape): {"shape": shape} for shape in MESHES[1:]}
        | {("eight", MESHES[0]): {"shape": MESHES[0], "save": str(path / "by_eight")}},
        make_start=True,
    )
    run(
        2,
        {("two", shape): {"shape": shape} for shape in MESHES[1:]}
        | {("two", MESHES[0]): {"shape": MESHES[0], "save": by_two, "interleaved": True}}
        | {"eight to two": {"shape": MESHES[-1], "load": str(path / "by_eight")}},
    )
    run(
        1,
        {
            "two to one": one | {"load": by_two},
            "two to eight": {"shape": (4, 2), "load": by_two},
        },
    )
    return found


@pytest.fixture(scope="module")
def tolerance(curves) -> float:
    """How far float32 sums in another order may take the losses apart.

    Changing every parameter by one unit in the last place before the first step shows how much
    such an error grows up to any later step. Other orders of summation make an error of that size
    at every step, not only before the first: at most so many times as much.
    """
    once = np.abs(np.subtract(curves["ulp"], curves["one"])).max()
    assert 0 < once < 1e-3
    return STEPS * once


@pytest.mark.parametrize("where", ["eight", "two"])
@pytest.mark.parametrize("shape", MESHES)
def test_losses_are_those_of_one_device(curves, tolerance, where, shape):
    losses = curves[where, shape]
    print(f"apart {np.abs(np.subtract(losses, curves['one'])).max():.1e}, allowed {tolerance:.1e}")
    assert len(losses) == STEPS and losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(losses, curves["one"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["eight to two", "two to one", "two to eight"])
def test_a_checkpoint_goes_on_with_other_devices_and_processes(curves, tolerance, name):
    losses = curves[name]
    apart = np.abs(np.subtract(losses, curves["one"][STEPS // 2 :])).max()
    print(f"apart {apart:.1e}, allowed {tolerance:.1e}")
    assert len(losses) == STEPS - STEPS // 2
    np.testing.assert_allclose(losses, curves["one"][STEPS // 2 :], rtol=0, atol=tolerance)
