"""The reader of HLO: what it counts is what was written."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from adacm2_jax.plan import hlo
from adacm2_jax.plan.loops import frame_loops, loop_name
from adacm2_jax.plan.topology import parse_topology, topology_devices
from adacm2_jax.sharding import make_mesh


def nested(weights, x):
    """Five rounds of three products [16, 256] × [256, 256], and one product of the result."""

    def outer(x, weight):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ weight), None), x, None, length=3)
        return x, x.T @ x

    return jax.lax.scan(outer, x, weights)


NESTED_FLOPS = 5 * (3 * 2 * 16 * 256 * 256 + 2 * 16 * 256 * 256)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh((-1, 1), topology_devices(parse_topology("v5e:2x2")))


@pytest.fixture(scope="module")
def sharded(mesh):
    """:func:`nested` on four TPUs, with weights and rows divided over them."""

    def shape(spec, *dims):
        place = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=place)

    arguments = shape((None, "data"), 5, 256, 256), shape(("data",), 64, 256)
    return hlo.read(jax.jit(nested).lower(*arguments).compile())


def test_products_in_nested_loops_are_multiplied_out():
    shapes = (jnp.zeros((5, 256, 256)), jnp.zeros((16, 256)))
    program = hlo.read(jax.jit(nested).lower(*shapes).compile())
    assert program.flops() == NESTED_FLOPS
    assert [(loop.trip_count, loop.executions) for loop in program.loops] == [(5, 5), (3, 15)]
    assert program.loops[1].parents == (program.loops[0],)
    assert program.collectives == ()


def test_products_on_a_tpu_are_convolutions_and_count_the_same(sharded):
    assert sharded.flops() == NESTED_FLOPS
    assert [loop.trip_count for loop in sharded.loops] == [5, 3]


def test_collectives_know_their_loops_and_sizes(sharded):
    gathers = [each for each in sharded.collectives if each.kind == "all-gather"]
    # In each of fifteen rounds a weight, of which a device has a quarter.
    assert sum(each.executions for each in gathers) == 15
    assert sum(each.bytes * each.executions for each in gathers) == 15 * 256 * 256 * 2 * 3 // 4
    assert all(each.dtype == "bf16" and each.loops for each in gathers)
    assert all(each.inside("while") and not each.inside("elsewhere") for each in gathers)
    (reduced,) = [each for each in sharded.collectives if each.kind == "all-reduce" and each.loops]
    # Of the result's quarters three arrive to be summed, and then the other three sums.
    assert (reduced.bytes, reduced.executions) == (2 * 3 * 256 * 256 * 2 // 4, 5)


def test_batched_products_of_a_tpu_count_no_padding(mesh):
    place = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((4, 2, 128, 64), jnp.bfloat16, sharding=place)
    attend = jax.jit(lambda x: jnp.einsum("bhqd,bhkd->bhqk", x, x))
    assert hlo.read(attend.lower(x).compile()).flops() == 2 * 2 * 128 * 128 * 64


def test_a_loop_that_data_end_has_no_trip_count():
    def halve(x, weight):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ weight, x)

    arguments = jnp.ones((8, 8)), jnp.eye(8) / 2
    program = hlo.read(jax.jit(halve).lower(*arguments).compile())
    (loop,) = program.loops
    assert loop.trip_count is None and loop.executions is None
    assert program.flops() == 2 * 8**3
    assert program.flops(unknown_trips=7) == 7 * 2 * 8**3


def test_a_slice_of_stacked_weights_counts_with_its_own_size():
    def walk(weights, x):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x * weight), None), x, weights)[0]

    weights, x = jnp.zeros((100, 64, 64)), jnp.zeros((64, 64))
    program = hlo.read(jax.jit(walk).lower(weights, x).compile())
    stacked = weights.nbytes
    assert stacked < program.bytes_accessed() < 8 * stacked


def walk_products(weights, x):
    """Twenty layers, all of whose outputs are kept."""
    return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), x), x, weights)


def test_a_product_on_a_tpu_reads_one_layer_of_stacked_weights(mesh):
    """There the slice is a fusion inside that of the product."""
    place = NamedSharding(mesh, PartitionSpec())
    weights = jax.ShapeDtypeStruct((20, 512, 512), jnp.bfloat16, sharding=place)
    x = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16, sharding=place)
    compiled = jax.jit(walk_products).lower(weights, x).compile()
    stacked, line = 20 * 512 * 512 * 2, 64 * 512 * 2
    # A layer reads its weight; the product, a copy and what keeps the output each read and write
    # a line, and one more may. A whole stack in each of twenty rounds would be far beyond.
    assert stacked < hlo.read(compiled).bytes_accessed() < stacked + 20 * 4 * 2 * line
    assert 20 * 4 * 2 * line < 2 * stacked


def test_gradients_that_stay_divided_are_scattered(mesh):
    """A TPU writes a reduce-scatter as a fusion of an all-reduce and a slice."""
    divided = NamedSharding(mesh, PartitionSpec(None, "data"))
    weights = jax.ShapeDtypeStruct((20, 512, 512), jnp.bfloat16, sharding=divided)
    place = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16, sharding=place)
    loss = jax.grad(lambda weights, x: walk_products(weights, x)[0].astype(jnp.float32).sum())
    program = hlo.read(jax.jit(loss, out_shardings=divided).lower(weights, x).compile())
    scatters = [each for each in program.collectives if each.kind == "reduce-scatter"]
    assert scatters
    assert sum(each.bytes * each.executions for each in scatters) == 20 * 512 * 512 * 2 * 3 // 4


IN_PLACE = """HloModule jit_f, is_scheduled=true

%write (p: bf16[100,64], q: bf16[1,64], i: s32[]) -> bf16[100,64] {
  %p = bf16[100,64]{1,0} parameter(0)
  %q = bf16[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %new = bf16[100,64]{1,0} dynamic-update-slice(%p, %q, %i, %zero)
}

%outer (a: bf16[100,64], b: bf16[1,64], j: s32[]) -> bf16[100,64] {
  %a = bf16[100,64]{1,0} parameter(0)
  %b = bf16[1,64]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %inner = bf16[100,64]{1,0} fusion(%a, %b, %j), kind=kLoop, calls=%write
}

ENTRY %main (x: bf16[100,64], y: bf16[1,64], k: s32[]) -> bf16[100,64] {
  %x = bf16[100,64]{1,0} parameter(0)
  %y = bf16[1,64]{1,0} parameter(1)
  %k = s32[] parameter(2)
  ROOT %out = bf16[100,64]{1,0} fusion(%x, %y, %k), kind=kOutput, calls=%outer
}
"""


def test_an_update_in_place_in_a_nested_fusion_counts_with_its_own_size():
    row, index = 64 * 2, 4
    assert hlo.read(IN_PLACE).bytes_accessed() == 2 * row + index


def test_what_is_no_hlo_is_refused():
    with pytest.raises(ValueError, match="no text of an HLO module"):
        hlo.read("fn main() {}")


CUBLAS = """HloModule jit_f, is_scheduled=true

ENTRY %main (a: bf16[128,64], b: bf16[64,32]) -> bf16[128,32] {
  %a = bf16[128,64]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  %gemm = (bf16[128,32]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %out = bf16[128,32]{1,0} get-tuple-element(%gemm), index=0
}
"""  # noqa: E501


def test_calls_of_cublas_are_products():
    assert hlo.read(CUBLAS).flops() == 2 * 128 * 32 * 64


SPREAD = """HloModule jit_f, is_scheduled=true

%first (p: bf16[8,64]) -> bf16[64,64] {
  %p = bf16[8,64]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[64,64]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}

%second (q: bf16[8,64]) -> bf16[64,64] {
  %q = bf16[8,64]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[64,64]{1,0} all-gather(%q), channel_id=7, dimensions={0}
}

ENTRY %main (a: bf16[8,64]) -> bf16[64,64] {
  %a = bf16[8,64]{1,0} parameter(0)
  %one = bf16[64,64]{1,0} fusion(%a), kind=kCustom, calls=%first
  ROOT %two = bf16[64,64]{1,0} fusion(%a), kind=kCustom, calls=%second
}
"""


def test_a_collective_that_is_spread_over_fusions_counts_once():
    (gather,) = hlo.read(SPREAD).collectives
    assert (gather.kind, gather.shapes, gather.bytes) == ("all-gather", ((64, 64),), 64 * 64 * 2)


GATHER = """HloModule jit_f, is_scheduled=true

ENTRY %main (a: bf16[8,64]) -> bf16[64,64] {{
  %a = bf16[8,64]{{1,0}} parameter(0)
  ROOT %out = bf16[64,64]{{1,0}} {kind}(%a), channel_id=7{groups}, dimensions={{0}}
}}
"""
RESULT = 64 * 64 * 2


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3}}", 2),
        ("{{0,1,2,3,4,5,6,7}}", 8),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=4,'b'=2] {'a'}", 4),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("mesh['a'=4,'b'=2] {'a':(1)2,'b'}", 4),
        ("{{0},{1}}", 1),
    ],
)
def test_bytes_of_a_collective_are_those_that_arrive(groups, size):
    def arriving(kind):
        text = GATHER.format(kind=kind, groups=f", replica_groups={groups}")
        (found,) = hlo.read(text).collectives
        return found.bytes

    assert arriving("all-gather") == arriving("all-to-all") == RESULT * (size - 1) // size
    assert arriving("reduce-scatter") == RESULT * (size - 1)
    assert arriving("all-reduce") == 2 * RESULT * (size - 1) // size
    assert arriving("collective-permute") == RESULT


@pytest.mark.parametrize("groups", ["", ", replica_groups={}", ", replica_groups=mesh['a'=4] {}"])
def test_a_collective_of_an_unknown_group_counts_its_result(groups):
    (found,) = hlo.read(GATHER.format(kind="reduce-scatter", groups=groups)).collectives
    assert found.bytes == RESULT


@pytest.mark.parametrize(
    ("op_name", "name"),
    [
        ("jit(observe)/AdaCM2.encode_frames/vision/while", "ViT blocks"),
        ("jit(train_step)/transpose(jvp(AdaCM2.answer_loss))/llm/while", "LLM layers (backward)"),
        ("jit(observe)/AdaCM2.read/qformer/while", "Q-Former layers"),
        ("jit(f)/AdaCM2.read/qformer/while/body/groups/cross_attention/while", "frames"),
    ],
)
def test_loops_have_names_for_people(op_name, name):
    loop = hlo.Loop("while.1", op_name, 3, (), "body")
    assert loop_name(loop, hlo.read(CUBLAS)) == name


def test_a_program_without_our_loops_has_no_frame_loop(sharded):
    assert frame_loops(sharded) == ()
