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
    "forgotten": replace(DOCUMENTS, forgotten=jnp.arange(T) % 3 + jnp.zeros_like(TOKENS) == 1),
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


MESHES = {
    "one device": {},
    "data": dict(data=2),
    "tensor": dict(tensor=2),
    "context": dict(context=2),
    "kv heads replicated": dict(tensor=4),
    "all": dict(data=2, tensor=2, context=2),
}


@pytest.mark.parametrize(
    ("implementation", "name", "kind", "num_kv_heads"),
    [("xla", name, "one device", 2) for name in VISIBILITIES]
    + [("splash", name, "one device", 2) for name in ("document", "documents", "documents, window")]
    + [("xla", "documents", "one device", 1), ("xla", "documents", "one device", 4)]
    + [("splash", "documents", "one device", 1)]
    + [("xla", "documents", kind, 2) for kind in MESHES]
    + [("plain", "documents", "all", 2), ("xla", "documents, window", "all", 2), ("splash", "documents", "all", 2)]
    + [("xla", "forgotten", "all", 2)]
    + [("splash", "documents, window", "context", 2), ("splash", "document", "context", 2)],
)
def test_a_backend_gives_the_values_and_gradients_of_the_definition(implementation, name, kind, num_kv_heads):
    mesh = MESHES[kind]
    with jax.set_mesh(mesh_of(**mesh)):
        result = run(implementation, VISIBILITIES[name], jnp.float32, mesh.get("context", 1), num_kv_heads)
    assert_close(result, reference(name, num_kv_heads), 1e-4)


@pytest.mark.parametrize("implementation", ["plain", "xla", "splash"])
def test_a_backend_stays_near_the_definition_in_bfloat16(implementation):
    # Values and gradients are of the order of 1 to 5, where bfloat16 has steps of 1/256 and more.
    assert_close(run(implementation, DOCUMENTS, jnp.bfloat16), reference("documents"), 0.06)


@pytest.mark.parametrize("implementation", ["plain", "xla"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "one device") for name in VISIBILITIES] + [("documents, window", kind) for kind in MESHES],
)
def test_queries_may_be_fewer_than_keys(implementation, name, kind):
    visibility, (q, k, v, _) = VISIBILITIES[name], arrays(jnp.float32)
    queries = visibility.slice(90, 30)
    with jax.set_mesh(mesh_of(**MESHES[kind])):
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
        ("splash", VISIBILITIES["forgotten"], None, "splash does not take forgotten keys"),
        ("cudnn", VISIBILITIES["forgotten"], None, "cudnn does not take forgotten keys"),
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
