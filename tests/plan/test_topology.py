"""Names of topologies, and what is said where one cannot be had."""

import sys

import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.plan.estimate import abstract_mesh
from adacm2_jax.plan.topology import CHIPS, parse_topology, topology_devices


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("v4:2x2x1", 4),
        ("v5e:4x4", 16),
        ("v5p:4x4x4", 64),
        ("h100", 1),
        ("a100:8", 8),
        ("h100:16", 16),
    ],
)
def test_names_are_read(name, count):
    assert parse_topology(name).count == count


@pytest.mark.parametrize(
    "name",
    ["v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "v9:2x2", "h100:0", "h100:12", "h100:", "v5e:0x4"],
)
def test_other_names_are_refused_in_one_line(name):
    with pytest.raises(UserError, match=r"--topology .*;|has \d axes|--topology .*:") as error:
        parse_topology(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:1x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x2"])
def test_every_kind_of_tpu_has_one_device_a_chip(name):
    topology = parse_topology(name)
    assert len(topology_devices(topology)) == topology.count


def test_a_shape_that_is_not_sold_is_refused_in_one_line():
    with pytest.raises(UserError, match="v5e:3x5 cannot be had") as error:
        topology_devices(parse_topology("v5e:3x5"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "package"), [("v5e:2x2", "jax[tpu]"), ("h100", "jax[cuda12]")])
def test_a_compiler_that_is_not_installed_is_named(name, package, monkeypatch):
    class Absent:
        @staticmethod
        def find_spec(module, path=None, target=None):
            if module.partition(".")[0] in ("libtpu", "jax_plugins"):
                raise ModuleNotFoundError(module)

    for module in [m for m in sys.modules if m.partition(".")[0] in ("libtpu", "jax_plugins")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    with pytest.raises(UserError) as error:
        topology_devices(parse_topology(name))
    assert f"pip install '{package}" in str(error.value)


def test_chips_have_a_balance_between_arithmetic_and_memory():
    for chip in CHIPS.values():
        assert 100 < chip.flops / chip.bandwidth < 1000


@pytest.mark.parametrize("shape", [(3, 1), (0, 4), (-1, 3), (4, 2)])
def test_a_mesh_that_does_not_cover_the_topology_is_refused(shape):
    with pytest.raises(UserError, match="does not cover"):
        abstract_mesh(shape, parse_topology("v5e:2x2"))
