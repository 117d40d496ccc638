"""What a training step eats, against arithmetic by hand."""

import dataclasses
import json

import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.plan import feed
from adacm2_jax.plan.report import Memory, Report, device_flops
from adacm2_jax.plan.topology import parse_topology
from adacm2_jax.sharding import make_mesh
from tests.plan.small import small_plan


def test_hosts_have_four_chips_or_eight_gpus():
    names = ("v5e:1x1", "v5e:4x4", "v5p:2x4x4", "h100", "h100:8", "h100:16")
    assert [parse_topology(name).hosts for name in names] == [1, 4, 8, 1, 1, 2]


def report(plan, flops: float) -> Report:
    memory = Memory(0, 0, 0, 0, 0, 0, 0)
    return Report(plan, parse_topology("v5e:4x4"), (1, 1), memory, True, flops, 0.0, 0.0, None)


@pytest.fixture(scope="module")
def eaten():
    mesh = make_mesh()
    plan = small_plan("train")
    return plan, mesh, feed.appetite(report(plan, 197e12), parse_topology("v5e:4x4"), mesh, 0.25)


def test_frames_are_those_of_a_step_over_its_time(eaten):
    found = eaten[2]
    # 197 TFLOP at a quarter of 197 TFLOP/s: four seconds for 4 clips of 8 frames, on four hosts.
    assert found["frames_a_second"] == pytest.approx(8 / 4) and found["hosts"] == 4


def test_features_are_eaten_at_the_pace_of_a_step_without_the_vit(eaten):
    plan, mesh, found = eaten
    without = device_flops(dataclasses.replace(plan, stored=True), mesh)
    with_vit = device_flops(plan, mesh)
    vision = plan.model.vision
    # At least the two products of each layer's MLP, and at most the whole ViT, are spared.
    mlp = 2 * 2 * vision.tokens_per_frame * vision.width * vision.mlp_width * vision.depth
    assert with_vit - without > 4 * 8 * mlp
    clips = found["features"]["clips_a_second"]
    assert clips == pytest.approx(0.25 * 197e12 / without)
    size = 8 * vision.tokens_per_frame
    assert found["features"]["bytes_a_second"] == pytest.approx(
        {"bfloat16": clips * size * vision.width * 2, "int8": clips * size * (vision.width + 4)}
    )


def test_a_vit_that_learns_has_no_stored_features():
    plan = small_plan("train", train__gradient="scan", optim__groups=((".*", 1.0),))
    found = feed.appetite(report(plan, 1e12), parse_topology("h100"), make_mesh(), 0.5)
    assert "features" not in found and "features" not in feed.render(found, {})


def test_cores_are_what_is_eaten_over_what_one_reads(tmp_path):
    rows = [
        {"name": "features, bfloat16", "ours": 50.0, "bytes": 10**7},
        {"name": "pixels, 480p", "ours": 40.0},
    ]
    path = tmp_path / "loader.json"
    path.write_text(json.dumps({"rows": rows}))
    eaten = {
        "share": 0.5,
        "hosts": 4,
        "frames_a_second": 800.0,
        "features": {"clips_a_second": 64.0, "bytes_a_second": {"bfloat16": 1e9, "int8": 5e8}},
    }
    assert feed.render(eaten, feed.read_loader(str(path))).splitlines() == [
        "  at 50% of the peak each of 4 hosts eats",
        "    800 frames/s of videos, 20.0 cores at 480p",
        "    or 64.0 clips/s of features, 1.00 GB/s from storage in bfloat16, 2.0 cores",
        "    or 64.0 clips/s of features, 0.50 GB/s from storage in int8",
    ]


@pytest.mark.parametrize(
    "content",
    [
        *(None, "{", "[]", '{"rows": [{"name": "x"}]}', '{"rows": []}', '{"rows": [1]}'),
        *(f'{{"rows": [{{"name": "x", "ours": {rate}}}]}}' for rate in ("0.0", "-5", "NaN", '"1"')),
    ],
)
def test_what_is_no_measurement_is_one_line(tmp_path, content):
    path = tmp_path / "loader.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"^--loader [^\n]*loader\.json[^\n]*$"):
        feed.read_loader(str(path))
