"""The count of matrix products: what is counted is what was written."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from adacm2_jax.memory.policies import plan_for
from adacm2_jax.plan.flops import product_flops
from adacm2_jax.plan.report import device_flops
from adacm2_jax.plan.topology import parse_topology, topology_devices
from adacm2_jax.sharding import make_mesh
from tests.plan.small import small_plan


def count(function, *arguments, **options) -> float:
    return product_flops(jax.jit(function).trace(*arguments).jaxpr, **options)


def nested(weights, x):
    """Five rounds of three products [16, 256] × [256, 256], and one product of the result."""

    def outer(x, weight):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ weight), None), x, None, length=3)
        return x, x.T @ x

    return jax.lax.scan(outer, x, weights)


def test_products_in_nested_loops_are_multiplied_out():
    arguments = jnp.zeros((5, 256, 256)), jnp.zeros((16, 256))
    product = 2 * 16 * 256 * 256
    assert count(nested, *arguments) == 5 * (3 * product + product)
    assert count(nested, *arguments, loops_once=True) == product + product


def test_without_loops_xla_counts_the_same():
    """Of convolutions and batched products; a result that nobody reads is not computed."""

    def products(image, kernel, a, b):
        maps = jax.lax.conv_general_dilated(image, kernel, (2, 2), "VALID")
        return maps, jnp.einsum("bhqd,bhkd->bhqk", a, b)

    def gradient(*arguments):
        _, back = jax.vjp(lambda a, b: jnp.einsum("bhqd,bhkd->bhqk", a, b), *arguments[2:])
        return products(*arguments)[0], back(jnp.ones((2, 3, 8, 8)))

    shapes = (2, 4, 16, 16), (6, 4, 3, 3), (2, 3, 8, 32), (2, 3, 8, 32)
    arguments = [jnp.ones(shape) for shape in shapes]
    for function, products_alone in ((products, 1), (gradient, 2)):
        found = jax.jit(function).lower(*arguments).cost_analysis()["flops"]
        by_hand = 2 * (2 * 6 * 7 * 7) * (4 * 3 * 3) + products_alone * 2 * 2 * 3 * 8 * 8 * 32
        assert count(function, *arguments) == found == by_hand


def test_what_is_rematerialised_counts_again():
    def layer(x, weight):
        return jnp.sin(jnp.sin(x @ weight) @ weight)

    def loss(weights, x, remat):
        body = jax.checkpoint(layer) if remat else layer
        return jax.lax.scan(lambda x, weight: (body(x, weight), None), x, weights)[0].sum()

    arguments = jnp.zeros((7, 32, 32)), jnp.zeros((4, 32))
    product = 2 * 4 * 32 * 32
    keeping, again = (
        count(jax.grad(lambda w, x, r=remat: loss(w, x, r), argnums=(0, 1)), *arguments)
        for remat in (False, True)
    )
    assert keeping == 7 * 2 * 3 * product  # each product, and the gradients of both its sides
    assert again - keeping == 7 * 2 * product


def test_a_loop_that_its_data_end_counts_the_rounds_that_are_said():
    def halve(x, weight):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ weight, x)

    arguments = jnp.ones((8, 8)), jnp.eye(8)
    assert count(halve, *arguments) == 2 * 8**3
    assert count(halve, *arguments, unknown_rounds=7) == 7 * 2 * 8**3
    assert count(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: x @ x, x), jnp.eye(8)) == 5 * 1024


def test_of_branches_the_dearest_counts():
    def choose(x):
        return jax.lax.switch(0, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    assert count(lambda i, x: jax.lax.switch(i, [choose, lambda x: x], x), 0, jnp.eye(4)) == 256


def test_functions_with_gradients_of_their_own_are_looked_into():
    @jax.custom_vjp
    def double(x):
        return x @ x

    double.defvjp(lambda x: (double(x), x), lambda x, g: (g @ x @ x @ x,))
    assert count(double, jnp.eye(8)) == 2 * 8**3
    gradient = jax.value_and_grad(lambda x: double(x).sum())
    assert count(gradient, jnp.eye(8)) == 4 * 2 * 8**3


@pytest.fixture(scope="module")
def tpus():
    """Sixteen TPUs, eight along ``data`` and two along ``model``."""
    return make_mesh((8, 2), topology_devices(parse_topology("v5e:4x4")))


def test_what_every_device_computes_by_itself_counts_once_for_each(tpus):
    place = NamedSharding(tpus, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=place)
    weight = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    spec = PartitionSpec("data"), PartitionSpec()
    with jax.set_mesh(tpus):
        alone = jax.shard_map(lambda x, w: x @ w, in_specs=spec, out_specs=spec[0], check_vma=False)
        assert count(lambda x, w: x @ w, x, weight) == 2 * 64 * 32 * 32
        # Eight rows a device; both devices of a data shard compute the same.
        assert count(alone, x, weight) == 16 * 2 * 8 * 32 * 32


# What follows is the arithmetic of the networks, by hand: it knows nothing of the program.


def vit(c) -> float:
    """One frame."""
    tokens, width = c.tokens_per_frame, c.width
    patches = 2 * (tokens - 1) * 3 * c.patch_size**2 * width
    dense = 2 * tokens * (4 * width**2 + 2 * width * c.mlp_width)
    return patches + c.depth * (dense + 2 * 2 * tokens**2 * width)


def token(c) -> float:
    """Key and value of a visual token in one layer."""
    return 2 * 2 * c.vision.width * c.qformer.width


def qformer(c, keys: int, context: int, projected: int) -> float:
    """One frame: what attends to ``keys`` visual tokens, of which ``projected`` are new, and to
    ``context`` rows of queries and text."""
    q, rows = c.qformer, c.qformer.num_queries + c.max_text_len
    own = 2 * 2 * (rows + context) * q.width**2 + 2 * 2 * rows * context * q.width
    feed = 2 * 2 * rows * q.width * q.mlp_width
    cross = 2 * 2 * q.num_queries * (q.width**2 + keys * q.width) + projected * token(c)
    return q.depth * (own + feed) + q.num_cross_layers * cross


def frame(c) -> float:
    """The Q-Former on one frame, by the policy."""
    tokens, rows = c.vision.tokens_per_frame, c.qformer.num_queries + c.max_text_len
    if c.memory.policy == "merge":
        frames = c.memory.bank_frames + 1
        return qformer(c, frames * tokens, frames * rows, frames * tokens)
    return qformer(c, plan_for(c).capacity + tokens, rows, tokens)


def llm(c, places: int, keys: int) -> tuple[float, float]:
    """Weights and attention of one sequence of ``places`` that sees ``keys``."""
    m = c.llm
    heads, kv = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    weights = m.width * (2 * heads + 2 * kv + 3 * m.mlp_width)
    return 2 * places * m.depth * weights, 2 * 2 * places * keys * heads * m.depth


def projection(c) -> float:
    return 2 * c.qformer.num_queries * c.qformer.width * c.llm.width


@pytest.mark.parametrize("policy", ["eq8", "full", "merge"])
def test_reading_a_chunk_is_the_arithmetic_of_its_frames(policy):
    plan = small_plan("stream", policy)
    c, tokens = plan.model, plan.model.vision.tokens_per_frame
    mesh = make_mesh((-1, 1), topology_devices(parse_topology("v5e:2x2")))
    read = frame(c)
    if policy == "full":  # nothing is scored, so the last frame alone has its queries read
        read = tokens * c.qformer.num_cross_layers * token(c)
        read += (frame(c) - read) / plan.frames
    by_hand = plan.batch * plan.frames * (vit(c.vision) + read) / mesh.size
    assert device_flops(plan, mesh) == by_hand


def test_answering_is_the_arithmetic_of_a_prompt_and_its_tokens(tpus):
    plan = small_plan("decode", eval__batch_size=8)
    c, longest = plan.model, plan.generation.max_new_tokens
    prompt = c.qformer.num_queries + c.max_text_len
    logits = 2 * c.llm.width * c.llm.vocab_size
    prefill = projection(c) + sum(llm(c, prompt, prompt + longest - 1)) + logits
    step = sum(llm(c, 1, prompt + longest - 1)) + logits
    by_hand = 8 * (prefill + (longest - 1) * step) / tpus.size
    assert device_flops(plan, tpus) == by_hand


def test_rows_that_do_not_divide_are_computed_by_every_data_shard(tpus):
    whole, odd = small_plan("decode", eval__batch_size=8), small_plan("decode", eval__batch_size=3)
    each = device_flops(whole, tpus) * 16 / 8
    assert device_flops(odd, tpus) == pytest.approx(3 * each / 2)


def test_training_is_the_arithmetic_of_a_clip_and_its_gradient(tpus):
    """ViT and language model are frozen; a product with a frozen weight has one gradient."""
    plan = small_plan("train", model__remat=False, train__batch_size=8)
    c, tokens = plan.model, plan.model.vision.tokens_per_frame
    places = c.qformer.num_queries + c.max_text_len + c.max_answer_len
    weights, attention = llm(c, places, places)
    logits = 2 * c.llm.width * c.llm.vocab_size * c.max_answer_len
    slots = (plan_for(c).capacity + tokens) * c.qformer.num_cross_layers * token(c)
    last = frame(c) + slots + projection(c)
    once = plan.frames * vit(c.vision) + 3 * last + 2 * (weights + logits) + 3 * attention
    # Both devices of a data shard read all its frames with the Q-Former; the ViT's are divided.
    by_hand = 8 * (once + 2 * plan.frames * frame(c)) / tpus.size
    assert device_flops(plan, tpus) == by_hand
