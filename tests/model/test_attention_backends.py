"""Every backend of attention against the definition in float32: values and gradients, on one device and on meshes."""

import functools
import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meap_jax import config, sharding
from meap_jax.model import attention as attention_lib
from meap_jax.model import attention_splash, attention_xla
from meap_jax.model.attention import attention
from meap_jax.model.config import ModelConfig, resolve
from meap_jax.model.visibility import causal
from tiny_models import mesh_of

B, T, H, d = 2, 256, 4, 8
TOKENS = jnp.zeros((B, T), jnp.int32)
SEGMENTS = jnp.asarray(np.repeat(np.int32([[1, 2, 0], [1, 1, 2]]), (100, 105, 51), axis=1))

DOCUMENT, DOCUMENTS = causal(TOKENS), causal(TOKENS, SEGMENTS)
BRANCH_IDS = jnp.asarray(np.repeat(np.int32([[0, 1, 0, 2], [0, 1, 2, 1]]), 64, axis=1))
VISIBILITIES = {
    "document": DOCUMENT,
    "documents": DOCUMENTS,
    "window": replace(DOCUMENT, window=130),
    "documents, window": replace(DOCUMENTS, window=33),
    "branches": replace(DOCUMENT, branch_ids=BRANCH_IDS),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The TPU kernel runs in Pallas' interpreter."""
    monkeypatch.setattr(attention_splash, "INTERPRET", True)


def arrays(dtype, num_kv_heads=2):
    rng = np.random.default_rng(num_kv_heads)
    shapes = (B, T, H, d), (B, T, num_kv_heads, d), (B, T, num_kv_heads, d), (B, T, H, d)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("implementation", "context"))
def values_and_gradients(q, k, v, weight, visibility, *, implementation, context):
    """Attention in the order of the text, and its gradients under a weighted sum."""

    def out(q, k, v):
        q, k, v = (sharding.zigzag(x, context) for x in (q, k, v))
        return sharding.unzigzag(attention(q, k, v, visibility, implementation=implementation), context)

    def scalar(q, k, v):
        return (out(q, k, v).astype(jnp.float32) * weight.astype(jnp.float32)).sum()

    return out(q, k, v), jax.grad(scalar, (0, 1, 2))(q, k, v)


def run(implementation, visibility, dtype, context=1, num_kv_heads=2):
    of_arrays = functools.partial(values_and_gradients, *arrays(dtype, num_kv_heads), visibility)
    return of_arrays(implementation=implementation, context=context)


@functools.cache
def reference(name, num_kv_heads=2):
    """The definition in float32, on one device."""
    return run("plain", VISIBILITIES[name], jnp.float32, num_kv_heads=num_kv_heads)


def assert_close(result, expected, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x, np.float32), y, atol=atol), result, expected)


KERNELS = ("document", "documents", "documents, window")  # What the TPU kernel can express.

# Largest errors relative to values and gradients of the order of 1 to 5; bfloat16 has steps of 1/256.
FLOAT32, BFLOAT16 = 1e-4, 0.06


@pytest.mark.parametrize("implementation, name", [("xla", n) for n in VISIBILITIES] + [("splash", n) for n in KERNELS])
def test_a_backend_gives_the_values_and_gradients_of_the_definition(implementation, name):
    assert_close(run(implementation, VISIBILITIES[name], jnp.float32), reference(name), FLOAT32)


@pytest.mark.parametrize("implementation", ["plain", "xla", "splash"])
def test_a_backend_stays_near_the_definition_in_bfloat16(implementation):
    assert_close(run(implementation, DOCUMENTS, jnp.bfloat16), reference("documents"), BFLOAT16)


@pytest.mark.parametrize("implementation, num_kv_heads", [("xla", 1), ("xla", 4), ("splash", 1)])
def test_kv_heads_serve_their_groups_in_every_backend(implementation, num_kv_heads):
    result = run(implementation, DOCUMENTS, jnp.float32, num_kv_heads=num_kv_heads)
    assert_close(result, reference("documents", num_kv_heads), FLOAT32)


MESHES = {
    "data": dict(data=2),
    "tensor": dict(tensor=2),
    "context": dict(context=2),
    "kv heads replicated": dict(tensor=4),
    "all": dict(data=2, tensor=2, context=2),
}


@pytest.mark.parametrize(
    ("implementation", "name", "kind"),
    [("xla", "documents", kind) for kind in MESHES]
    + [("plain", "documents", "all"), ("xla", "documents, window", "all")]
    + [("splash", "documents", "all"), ("splash", "documents, window", "context"), ("splash", "document", "context")],
)
def test_a_mesh_changes_nothing(implementation, name, kind):
    with jax.set_mesh(mesh_of(**MESHES[kind])):
        result = run(implementation, VISIBILITIES[name], jnp.float32, MESHES[kind].get("context", 1))
    assert_close(result, reference(name), FLOAT32)


@pytest.mark.parametrize("implementation", ["plain", "xla"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, None) for name in VISIBILITIES] + [("documents, window", kind) for kind in MESHES],
)
def test_queries_may_be_fewer_than_keys(implementation, name, kind):
    visibility, (q, k, v, _) = VISIBILITIES[name], arrays(jnp.float32)
    queries = visibility.part(90, 30)
    with jax.set_mesh(mesh_of(**MESHES.get(kind, {}))):
        result = jax.jit(lambda q: attention(q, k, v, queries, visibility, implementation))(q[:, 90:120])
    np.testing.assert_allclose(result, reference(name)[0][:, 90:120], atol=1e-5)


def test_kv_heads_that_tensor_does_not_divide_can_serve_query_heads_across_devices():
    # 6 query heads on 3 devices, 2 kv heads: the second device's two query heads read one each.
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 128, heads, 8)), jnp.float32) for heads in (6, 2, 2))
    visibility = causal(jnp.zeros((1, 128), jnp.int32))
    expected = attention(q, k, v, visibility, implementation="plain")
    with jax.set_mesh(mesh_of(tensor=3)):
        result = jax.jit(lambda *x: attention(*x, visibility, implementation="xla"))(q, k, v)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_blocks_of_queries_see_no_more_than_the_keys_before_them():
    q, k, v, _ = arrays(jnp.float32)
    text = str(jax.make_jaxpr(lambda *x: attention(*x, DOCUMENT, implementation="xla"))(q, k, v))
    rows = H // 2 * attention_xla.SMALLEST_BLOCK
    for reach in (128, 256):
        assert f"f32[{rows},{reach}]" in text
    assert f"f32[{rows * 2},256]" not in text


@pytest.mark.parametrize(
    ("implementation", "visibility", "keys", "reason"),
    [
        ("splash", VISIBILITIES["branches"], None, "splash does not take branches"),
        ("splash", causal(TOKENS[:, :80]), None, "80 queries a device, which is no multiple of"),
        ("cudnn", DOCUMENT, None, "cudnn does not take float32 arrays"),
        ("splash", DOCUMENT, DOCUMENT, "splash does not take keys apart from the queries"),
        ("cudnn", DOCUMENT, DOCUMENT, "cudnn does not take keys apart from the queries"),
    ],
)
def test_what_a_kernel_cannot_express_goes_to_xla_with_a_line_in_the_log(
    implementation, visibility, keys, reason, caplog
):
    attention_lib._log_once.cache_clear()
    shape = (*visibility.positions.shape, H, d)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    with caplog.at_level(logging.WARNING, logger="meap_jax"):
        result = attention(x, x, x, visibility, keys, implementation)
    assert reason in caplog.text and "xla does it" in caplog.text
    np.testing.assert_allclose(result, attention(x, x, x, visibility), atol=1e-5)


def test_auto_is_the_kernel_of_the_platform():
    assert [resolve("auto", p) for p in ("tpu", "gpu", "cuda", "cpu")] == ["splash", "cudnn", "cudnn", "xla"]
    assert resolve("plain", "tpu") == "plain"
    assert ModelConfig.of(config.base().model, "tpu").attention == "splash"
