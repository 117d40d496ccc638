"""A run is the same on one device, on eight, and in two processes; also across its checkpoints.

``make test`` trains on one device and in two processes, whose checkpoint goes on in one process of
eight devices. ``make check-curves`` has more meshes and every way across.
"""

import os

import numpy as np
import pytest

from tests.distributed.conftest import run_curves
from tests.distributed.curves import STEPS

#: Every mesh compiles for itself in every process: minutes for all.
ALL = bool(os.environ.get("ALL_MESHES"))
MESHES = ((8, 1), (4, 2), (2, 4)) if ALL else ((4, 2),)
PLACES = ("eight", "two") if ALL else ("two",)
WAYS = ("eight to two", "two to one", "two to eight") if ALL else ("two to eight",)


@pytest.fixture(scope="module")
def curves(compiled_once, tmp_path_factory) -> dict:
    """Losses by where they were computed."""
    path = tmp_path_factory.mktemp("curves")
    found = {}

    def run(processes: int, jobs: dict, **options) -> None:
        results = run_curves(path, processes, list(jobs.values()), **options)
        found.update(zip(jobs, results, strict=True))

    one, by_two = {"shape": (1, 1)}, str(path / "by_two")
    by_one_process = {"one": one, "ulp": one | {"ulp": True}}
    by_two_processes = {
        ("two", shape): {"shape": shape} | ({"save": by_two, "interleaved": True} if not i else {})
        for i, shape in enumerate(MESHES)
    }
    after = {"two to eight": {"shape": (4, 2), "load": by_two}}
    if ALL:
        by_eight = str(path / "by_eight")
        by_one_process |= {
            ("eight", shape): {"shape": shape} | ({} if i else {"save": by_eight})
            for i, shape in enumerate(MESHES)
        }
        by_two_processes["eight to two"] = {"shape": MESHES[-1], "load": by_eight}
        after["two to one"] = one | {"load": by_two}
    run(1, by_one_process, make_start=True)
    run(2, by_two_processes)
    run(1, after)
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


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("shape", MESHES)
def test_losses_are_those_of_one_device(curves, tolerance, where, shape):
    losses = curves[where, shape]
    print(f"apart {np.abs(np.subtract(losses, curves['one'])).max():.1e}, allowed {tolerance:.1e}")
    assert len(losses) == STEPS and losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(losses, curves["one"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", WAYS)
def test_a_checkpoint_goes_on_with_other_devices_and_processes(curves, tolerance, name):
    losses = curves[name]
    apart = np.abs(np.subtract(losses, curves["one"][STEPS // 2 :])).max()
    print(f"apart {apart:.1e}, allowed {tolerance:.1e}")
    assert len(losses) == STEPS - STEPS // 2
    np.testing.assert_allclose(losses, curves["one"][STEPS // 2 :], rtol=0, atol=tolerance)
