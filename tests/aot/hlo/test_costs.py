"""Costs of programs, counted from their text: small ones compiled for the CPU, and lines of TPU and GPU programs."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from meap_jax.aot.hlo import analyze


def compiled(f, *shapes):
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) if isinstance(s, tuple) else s for s in shapes]
    return analyze(jax.jit(f).lower(*arguments).compile().as_text(), jax.device_count())


def product(n, layers=1):
    return 2 * n**3 * layers


def times(x, w):
    return jnp.tanh(x @ w)


def scanned(body, x, weights, **options):
    return jax.lax.scan(lambda x, w: (body(x, w), None), x, weights, **options)[0]


def five_times(x, w):
    return jax.lax.fori_loop(0, 5, lambda _, x: times(x, w), x)


def dearer(flag, x):
    return jax.lax.cond(flag, lambda x: jnp.tanh(x @ x @ x), lambda x: jnp.tanh(x @ x), x)


def convolved(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME")


@pytest.mark.parametrize(
    "function, shapes, flops",
    [
        (jnp.matmul, [(32, 48), (48, 16)], 2 * 32 * 48 * 16),
        (functools.partial(jnp.einsum, "bqhd,bkhd->bhqk"), [(2, 8, 3, 16), (2, 24, 3, 16)], 2 * 2 * 3 * 8 * 24 * 16),
        (functools.partial(scanned, times), [(64, 64), (7, 64, 64)], product(64, 7)),
        (functools.partial(scanned, five_times), [(64, 64), (3, 64, 64)], product(64, 15)),
        (dearer, [jax.ShapeDtypeStruct((), jnp.bool_), (64, 64)], product(64, 2)),
        # 10 positions, 3 taps, 1 of padding each side.
        (convolved, [(2, 4, 10), (5, 4, 3)], 2 * 2 * 4 * 5 * (10 * 3 - 2)),
    ],
    ids=["product", "batched", "loop", "loop in a loop", "dearer branch", "convolution without its padding"],
)
def test_flops_are_two_a_product_that_is_added_up_as_often_as_it_runs(function, shapes, flops):
    assert compiled(function, *shapes).flops == flops


def test_scanned_and_unrolled_layers_count_the_same_with_their_gradient():
    def loss(weights, x, unroll):
        return scanned(times, x, weights, unroll=unroll).sum()

    scan, unrolled = (
        compiled(jax.grad(functools.partial(loss, unroll=unroll)), (4, 64, 64), (64, 64)).flops for unroll in (1, 4)
    )
    # Forward, and both gradients of a product; that of the first layer's input is not asked for.
    assert (scan, unrolled) == (product(64, 4 * 3), product(64, 4 * 3 - 1))


def test_a_loop_whose_length_depends_on_data_counts_once_and_is_named():
    costs = compiled(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jnp.tanh(x @ x), x), (64, 64))
    assert (costs.flops, len(costs.unknown_loops)) == (product(64), 1)


def layers(x, *weights):
    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.square(x).sum()


def test_without_loops_memory_traffic_is_what_xla_counts():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 256), *[(256, 256)] * 3)]
    program = jax.jit(jax.value_and_grad(layers, (1, 2, 3))).lower(*shapes).compile()
    assert analyze(program.as_text()).bytes == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.01)
    assert compiled(jnp.tanh, (256, 256)).bytes == 2 * 256 * 256 * 4


def test_a_scan_reads_a_slice_of_its_inputs_a_trip():
    """Not all of them each time, which would be 64 times too much."""
    inputs = 64 * 1024 * 1024 * 4
    costs = compiled(functools.partial(scanned, jnp.add), (1024, 1024), (64, 1024, 1024))
    assert inputs < costs.bytes < 8 * inputs


def sent(costs):
    """{kind: (number, bytes)} of collectives."""
    return {kind: (number, costs.sent[kind]) for kind, number in costs.collectives.items()}


WHOLE = 64 * 64 * 4


def six_times(x):
    return jax.lax.fori_loop(0, 6, lambda _, x: jnp.tanh(jax.lax.psum(x, "a")), x)


RING = [(i, (i + 1) % 4) for i in range(4)]


@pytest.mark.parametrize(
    "function, read, written, kind, number, num_bytes",
    [
        # One's own quarter to each of the three others.
        (lambda x: jax.lax.all_gather(x, "b", tiled=True), P("b"), P(), "all-gather", 1, WHOLE // 4 * 3),
        (lambda x: jax.lax.psum(x, "b"), P(), P(), "all-reduce", 1, 2 * WHOLE * 3 // 4),
        (lambda x: jax.lax.ppermute(x, "b", RING), P("b"), P("b"), "collective-permute", 1, WHOLE // 4),
        (lambda x: jax.lax.all_to_all(x, "b", 0, 0, tiled=True), P("b"), P("b"), "all-to-all", 1, WHOLE // 4 * 3 // 4),
        # Six trips of a loop.
        (six_times, P(), P(), "all-reduce", 6, 6 * WHOLE),
    ],
)
def test_collectives_send_what_a_ring_of_devices_sends(function, read, written, kind, number, num_bytes):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=read, out_specs=written, check_vma=False)
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, read))
    assert sent(compiled(mapped, x)) == {kind: (number, num_bytes)}


# Lines of programs for TPUs and GPUs, as their compilers write them.


def count(entry, computations="", **options):
    """Of a program with these lines in its entry computation, and with other computations."""
    text = f"HloModule m\n{computations}\nENTRY %main (p: f32[]) -> f32[] {{\n{entry}\n}}"
    return analyze(text, num_devices=8, **options)


def test_a_loop_without_a_known_length_is_counted_by_its_constants():
    """libtpu gives no trip count; this is its collective matmul, which takes two steps of eight a trip."""
    computations = """
%cond (c: (u32[], f32[8,8])) -> pred[] {
  %end = u32[]{:T(128)} constant(8)
  %c = (u32[]{:T(128)}, f32[8,8]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %end), direction=LT
}
%step (i.2: u32[]) -> u32[] {
  %i.2 = u32[] parameter(0)
  %two = u32[] constant(2)
  ROOT %next = u32[] add(%i.2, %two)
}
%body (b: (u32[], f32[8,8])) -> (u32[], f32[8,8]) {
  %b = (u32[], f32[8,8]{1,0}) parameter(0)
  %i.3 = u32[] get-tuple-element(%b), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%b), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %fusion = u32[] fusion(%i.3), kind=kLoop, calls=%step
  ROOT %both = (u32[], f32[8,8]{1,0}) tuple(%fusion, %y)
}"""
    entry = """
  %p = f32[8,8]{1,0} parameter(0)
  %zero = u32[] constant(0)
  %copied = u32[] copy(%zero)
  %init = (u32[], f32[8,8]{1,0}) tuple(%copied, %p)
  ROOT %while = (u32[], f32[8,8]{1,0}) while(%init), condition=%cond, body=%body"""
    costs = count(entry, computations)
    assert (costs.flops, len(costs.unknown_loops)) == (4 * product(8), 0)


PAIR = "f32[2,16,8] f32[2,16,32] f32[2,32,8]"


@pytest.mark.parametrize(
    "shapes, attributes, flops",
    [
        # A plain product as TPUs write it: [4096, 768] by [768, 2048].
        ("f32[4096,2048] f32[4096,768] f32[768,2048]", "dim_labels=bf_io->bf", 2 * 4096 * 768 * 2048),
        # A window over two positions and a padded one on each side: of 2 x 2 pairs, one meets padding.
        (PAIR, "window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=0bf_0io->0bf", 2 * 16 * 32 * 8 * 3),
        # A batch of two products: the gaps of the dilated input keep each matrix to its own.
        (PAIR, "window={size=2 stride=1 lhs_dilate=2}, dim_labels=0bf_0io->0bf", 2 * 16 * 32 * 8 * 2),
    ],
)
def test_products_written_as_convolutions_count_what_meets(shapes, attributes, flops):
    out, lhs, rhs = shapes.split()
    costs = count(f"""
  %p = {lhs}{{1,0:T(8,128)S(1)}} parameter(0)
  %k = {rhs}{{1,0}} parameter(1)
  ROOT %c = {out}{{1,0}} convolution(%p, %k), {attributes}""")
    assert costs.flops == flops


def test_on_chip_memory_is_no_traffic():
    entry = """
  %p = f32[1024]{0} parameter(0)
  %start = (f32[1024]{0}, f32[1024]{0:S(1)}, u32[]{:S(2)}) copy-start(%p)
  %done = f32[1024]{0:S(1)} copy-done(%start)
  ROOT %t = f32[1024]{0:S(1)} tanh(%done)"""
    assert count(entry).bytes == 4096
    assert count(entry, hbm_spaces=(0, 1)).bytes == 4 * 4096


def test_an_asynchronous_collective_in_several_steps_counts_once():
    """TPUs repeat the instruction in every fusion that carries it on."""
    steps = "".join(
        f"""
%{name} (a: bf16[8,16]) -> bf16[64,16] {{
  %a.{name} = bf16[8,16]{{1,0}} parameter(0)
  %g.{name} = bf16[64,16]{{1,0}} all-gather(%a.{name}), channel_id=1, replica_groups=[1,8]<=[8], dimensions={{0}}
  ROOT %r.{name} = (bf16[64,16]{{1,0}}) {result.format(gathered=f"%g.{name}")}
}}"""
        for name, result in {
            "first": 'custom-call({gathered}), custom_call_target="AsyncCollectiveStart"',
            "async_collective_fusion.1": "tuple({gathered})",
            "last": 'custom-call({gathered}), custom_call_target="AsyncCollectiveDone"',
        }.items()
    )
    entry = """
  %p = bf16[8,16]{1,0} parameter(0)
  %f1 = (bf16[64,16]{1,0}) fusion(%p), kind=kCustom, calls=%first
  %f2 = (bf16[64,16]{1,0}) fusion(%p), kind=kOutput, calls=%async_collective_fusion.1
  ROOT %f3 = bf16[64,16]{1,0} fusion(%p), kind=kCustom, calls=%last"""
    assert sent(count(entry, steps)) == {"all-gather": (1, 8 * 16 * 2 * 7)}


def test_what_another_core_runs_asynchronously_counts_once():
    """TPUs with SparseCores give them collectives, in computations whose last line names the thread."""
    other = """
%wrapped (a: f32[8,16]) -> f32[64,16] {
  %a = f32[8,16]{1,0} parameter(0)
  ROOT %g = f32[64,16]{1,0} all-gather(%a), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
}, execution_thread="sparsecore\""""
    entry = """
  %p = f32[8,16]{1,0} parameter(0)
  %s = ((f32[8,16]{1,0}), f32[64,16]{1,0}) async-start(%p), calls=%wrapped
  %u = ((f32[8,16]{1,0}), f32[64,16]{1,0}) async-update(%s)
  ROOT %d = f32[64,16]{1,0} async-done(%u)"""
    assert sent(count(entry, other)) == {"all-gather": (1, 8 * 16 * 4 * 7)}


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("replica_groups={}", 8),
    ],
)
def test_groups_of_a_collective_in_each_notation(groups, size):
    costs = count(f"""
  %p = f32[64]{{0}} parameter(0)
  ROOT %r = f32[64]{{0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add""")
    assert sent(costs) == {"all-reduce": (1, 2 * 256 * (size - 1) // size)}


CUDNN = (
    '"cudnn_fmha_backend_config": {{"intermediate_tensor_shape": {{"element_type": "BF16", '
    '"dimensions": ["2", "4", "1024", "1024"]}}, "mask_type": "{mask}"}}'
)


@pytest.mark.parametrize("mask, share", [("CAUSAL", 0.5), ("PADDING_CAUSAL", 0.5), ("NO_MASK", 1)])
@pytest.mark.parametrize("target, products", [("__cudnn$fmhaSoftmax", 2), ("__cudnn$fmhaSoftmaxBackward", 5)])
def test_cudnn_attention_counts_its_products(mask, share, target, products):
    call = f'custom-call(%q, %k), custom_call_target="{target}", backend_config={{{CUDNN.format(mask=mask)}}}'
    costs = count(f"""
  %q = bf16[2,1024,4,64]{{3,2,1,0}} parameter(0)
  %k = bf16[2,1024,2,64]{{3,2,1,0}} parameter(1)
  ROOT %attend.3 = (bf16[2,4,1024,64]{{3,1,2,0}}) {call}""")
    assert costs.flops == products * 2 * 2 * 4 * 1024 * 1024 * 64 * share
    assert costs.kernels == {"attend": 1}


@pytest.mark.parametrize(
    "name, results, products",
    [
        ("splash_mqa_fwd_segmented_residuals", "f32[512,64], bf16[2,4,1024,64]", 2),
        ("splash_mha_fwd_no_residuals", "f32[512,64], bf16[2,4,1024,64]", 2),
        ("splash_mqa_dq_segmented_no_residuals", "f32[512,64], bf16[2,4,1024,64]", 3),
        ("splash_mqa_dkv_segmented_no_residuals", "f32[512,64], bf16[2,1024,64], bf16[2,1024,64]", 4),
        # With use_fused_bwd_kernel it gives the gradient of the queries as well.
        ("splash_mqa_dkv_no_residuals", "bf16[2,2,4,1024,64], bf16[2,1024,64], bf16[2,1024,64]", 5),
    ],
)
def test_splash_attention_counts_its_products_over_half_of_the_pairs(name, results, products):
    call = (
        'custom-call(%mask, %q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={'
    )
    costs = count(f"""
  %mask = s8[1,2,2]{{2,1,0}} parameter(0)
  %q = bf16[2,4,1024,64]{{3,2,1,0}} parameter(1)
  %k = bf16[2,1024,64]{{2,1,0}} parameter(2)
  ROOT %{name}.1 = ({results}) {call}
"xprof_metadata":"{{}}"
}}}}""")
    assert costs.flops == products * 2 * 2 * 4 * 1024 * 1024 * 64 // 2
    assert costs.kernels == {name: 1}


def test_a_kernel_that_no_formula_covers_is_named():
    costs = count("""
  %p = f32[8]{0} parameter(0)
  ROOT %mine.4 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call\"""")
    assert (costs.flops, costs.unknown_kernels) == (0, {"mine": 1})


def test_cublas_products_count_by_their_config():
    config = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    call = f'custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={config}'
    costs = count(f"""
  %a = bf16[64,32]{{1,0}} parameter(0)
  %b = bf16[32,16]{{1,0}} parameter(1)
  ROOT %g = (bf16[64,16]{{1,0}}, s8[64]{{0}}) {call}""")
    assert costs.flops == 2 * 64 * 32 * 16


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        analyze("nothing")
