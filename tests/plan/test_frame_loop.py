"""What our checks read in a compiled program: collectives, and whether a frame loop has them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from adacm2_jax.plan.topology import parse_topology, topology_devices
from adacm2_jax.sharding import make_mesh
from benchmarks._hlo import frame_loops, read


@pytest.mark.parametrize("name", ["cross_attention", "llm"])
def test_what_is_sent_in_a_loop_is_found_there(name):
    mesh = make_mesh((-1, 1), topology_devices(parse_topology("v5e:2x2")))
    place = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=place)

    def walk(x):
        def frame(x, _):
            return jnp.sin(x + jax.lax.psum(x, "data")), None

        with jax.named_scope(name):
            x, _ = jax.lax.scan(frame, x, None, length=50)
        return jax.lax.all_gather(x, "data")

    with jax.set_mesh(mesh):
        spec = PartitionSpec("data")
        run = jax.shard_map(walk, in_specs=spec, out_specs=PartitionSpec(), check_vma=False)
        sent, loops = read(jax.jit(run).lower(x).compile().as_text())
    inside = {each.kind for each in sent if each.loops}
    assert inside == {"all-reduce"} and "all-gather" in {each.kind for each in sent}
    assert (16, 256) in next(each.shapes for each in sent if each.loops)
    found = {each.kind for each in sent if each.in_frame_loop}
    if name == "llm":
        assert found == set() == frame_loops(loops)
    else:
        assert found == inside and frame_loops(loops) == {"frames"}


PROGRAM = """HloModule jit_f

%gather (p: bf16[8,64]) -> bf16[64,64] {
  %p = bf16[8,64]{1,0} parameter(0)
  ROOT %out = (bf16[8,64]{1,0}, bf16[64,64]{1,0:T(8,128)}) all-gather-start(%p), dimensions={0}
}

%body (s: (s32[])) -> (s32[]) {
  ROOT %x = bf16[64,64]{1,0} fusion(%p), kind=kCustom, calls=%gather
}

%test (s: (s32[])) -> pred[] {
  ROOT %y = pred[] constant(true)
}

ENTRY %main (a: bf16[8,64]) -> bf16[64,64] {
  %loop = (s32[]) while(%a), condition=%test, body=%body, metadata={op_name="jit(f)/vision/while"}
  ROOT %sum = f32[2]{0} all-reduce(%b), to_apply=%test
}
"""


def test_a_collective_in_a_fusion_of_a_loop_stands_in_the_loop():
    (gather, reduce), loops = read(PROGRAM)
    assert (gather.kind, gather.shapes) == ("all-gather", ((8, 64), (64, 64)))
    assert gather.loops == ("jit(f)/vision/while",) and gather.in_frame_loop
    assert (reduce.kind, reduce.loops, reduce.in_frame_loop) == ("all-reduce", (), False)
    assert frame_loops(loops) == {"ViT blocks"}


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read("fn main() {}")
