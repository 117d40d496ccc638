"""Names of topologies, and what is said where one cannot be had."""

import sys
import types
from typing import Any

import jax
import numpy as np
import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.plan.topology import CHIPS, Topology, parse_topology, topology_devices
from adacm2_jax.sharding import data_share, make_mesh, rows_per_process


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("v4:2x2x1", 4),
        ("v5e:4x4", 16),
        ("v5p:4x4x4", 64),
        ("h100", 1),
        ("a100:8", 8),
        ("h100:16", 16),
        ("a100-40:2", 2),
        ("v5e:16x16", 256),
        ("v5p:16x16x24", 6144),
    ],
)
def test_names_are_read(name, count):
    assert parse_topology(name).count == count


@pytest.mark.parametrize(
    "name",
    ["v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "v9:2x2", "h100:0", "h100:12", "h100:", "v5e:0x4"]
    + ["v5e:64x64", "v5e:3x5", "v6e:16x32", "v4:4x4x20", "v5p:4x4x32", "v5p:4x4x6", "a100-80"],
)
def test_other_names_are_refused_in_one_line(name):
    with pytest.raises(
        UserError, match=r"^--topology .*(give|has \d axes|has no slice \d+ chips long; sides are)"
    ) as error:
        parse_topology(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:1x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x2"])
def test_every_kind_of_tpu_has_one_device_a_chip(name):
    topology = parse_topology(name)
    assert len(topology_devices(topology)) == topology.count


def test_a_shape_that_the_compiler_does_not_know_is_refused_in_one_line():
    with pytest.raises(UserError, match="v5e:3x5 cannot be had") as error:
        topology_devices(Topology("v5e:3x5", "v5e", (3, 5)))
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


def test_the_two_sizes_of_an_a100_differ_in_memory_alone_and_its_bandwidth():
    small, large = CHIPS["a100-40"], CHIPS["a100"]
    assert 0.95 * 39e9 < small.hbm < 0.95 * 43e9 < large.hbm
    assert (small.flops, small.bandwidth) == (large.flops, 1555e9)


def test_chips_have_a_balance_between_arithmetic_and_memory():
    for chip in CHIPS.values():
        assert 100 < chip.flops / chip.bandwidth < 1000


@pytest.mark.parametrize("shape", [(3, 1), (0, 4), (-1, 3), (4, 2)])
def test_a_mesh_that_does_not_cover_the_topology_is_refused(shape):
    with pytest.raises(UserError, match="does not cover"):
        make_mesh(shape, topology_devices(parse_topology("v5e:2x2")))


@pytest.mark.parametrize(
    ("name", "shape", "shares"),
    [
        ("v5e:4x4", (-1, 1), 4),
        ("v5e:4x4", (2, 8), 2),  # a data shard on two hosts: both bring the same rows
        ("v5e:4x4", (1, 16), 1),
        ("v6e:4x4", (8, 2), 4),  # needs half an axis of the torus
        ("v5p:2x4x4", (-1, 1), 8),
        ("v5p:4x4x4", (32, 2), 16),
        ("v5e:16x16", (-1, 1), 64),
    ],
)
def test_the_hosts_of_a_slice_bring_every_row_of_a_batch_once(monkeypatch, name, shape, shares):
    """On a torus the mesh follows the links, so the shards of a host are no neighbours."""
    mesh = make_mesh(shape, topology_devices(parse_topology(name)))
    hosts = {device.process_index for device in mesh.devices.flat}
    monkeypatch.setattr(jax, "process_count", lambda: len(hosts))
    by_rank: dict[int, set] = {}
    for host in hosts:
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        rank, world = data_share(mesh)
        assert world == shares and rows_per_process(512, mesh) == 512 // shares
        held = [i for i, row in enumerate(mesh.devices) for d in row if d.process_index == host]
        by_rank.setdefault(rank, set()).add(tuple(sorted(set(held))))
    assert sorted(by_rank) == list(range(shares))
    # Those of one rank hold the same shards, and together all shards are held once.
    assert all(len(found) == 1 for found in by_rank.values())
    everything = [shard for found in by_rank.values() for shard in next(iter(found))]
    assert sorted(everything) == list(range(mesh.shape["data"]))


def test_hosts_with_unequal_shares_are_refused(monkeypatch):
    devices = [[types.SimpleNamespace(process_index=host)] for host in (0, 0, 1)]
    mesh: Any = types.SimpleNamespace(devices=np.array(devices))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"hold data shards \(0, 1\), \(2,\); choose a mesh"):
        data_share(mesh)
