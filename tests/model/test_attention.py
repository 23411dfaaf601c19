"""Visibility, attention and RoPE, against slow loops in double precision."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meap_jax.model.attention import attention
from meap_jax.model.rope import rope
from meap_jax.model.visibility import Visibility, causal

B, T, H, d = 2, 8, 4, 6


def qkv(num_kv_heads=2):
    rng = np.random.default_rng(num_kv_heads)
    shapes = (B, T, H, d), (B, T, num_kv_heads, d), (B, T, num_kv_heads, d)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def sees(v: Visibility, b: int, query: int, key: int) -> bool:
    """The conditions of `Visibility`, one after the other."""
    distance = v.positions[b][query] - v.positions[b][key]
    if v.forgotten is not None and v.forgotten[b][key] and distance > 0:
        return False
    if v.segment_ids[b][query] != v.segment_ids[b][key] or distance < 0:
        return False
    if v.window is not None and distance >= v.window:
        return False
    return v.branch_ids is None or v.branch_ids[b][key] in (0, v.branch_ids[b][query])


def slow_attention(q, k, v, visibility):
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        keys = [s for s in range(q.shape[1]) if sees(visibility, b, t, s)]
        weights = [math.exp(np.float64(q[b, t, h]) @ k[b, s, h // group] / math.sqrt(q.shape[3])) for s in keys]
        out[b, t, h] = sum(w * v[b, s, h // group] for w, s in zip(weights, keys, strict=True)) / sum(weights)
    return out


ROW = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
ONE_DOCUMENT = Visibility(np.ones((B, T), np.int32), ROW)
# Two documents and padding; one document that starts at position 5.
DOCUMENTS = Visibility(
    np.int32([[1, 1, 1, 2, 2, 2, 0, 0], [1] * T]), np.int32([[0, 1, 2, 0, 1, 2, 0, 1], [*range(5, 13)]])
)
# A trunk of three and two branches that continue it side by side, each from position 3.
BRANCHES = replace(
    ONE_DOCUMENT,
    positions=np.int32([[0, 1, 2, 3, 4, 5, 3, 4]] * B),
    branch_ids=np.int32([[0, 0, 0, 1, 1, 1, 2, 2]] * B),
)


@pytest.mark.parametrize(
    "visibility, num_kv_heads",
    [(ONE_DOCUMENT, 1), (ONE_DOCUMENT, 2), (ONE_DOCUMENT, H), (DOCUMENTS, 2), (replace(ONE_DOCUMENT, window=3), 2)]
    + [(replace(DOCUMENTS, window=1), 2), (BRANCHES, 2), (replace(BRANCHES, window=2), 2)]
    + [(replace(DOCUMENTS, forgotten=ROW % 3 == 1), 2)],
)
def test_attention_is_that_of_a_slow_loop(visibility, num_kv_heads):
    arrays = qkv(num_kv_heads)
    result = attention(*map(jnp.asarray, arrays), jax.tree.map(jnp.asarray, visibility))
    np.testing.assert_allclose(result, slow_attention(*arrays, visibility), atol=1e-5)


def test_a_permuted_sequence_sees_what_its_positions_say():
    order = np.array([3, 0, 7, 1, 6, 2, 5, 4])
    q, k, v = qkv()
    visibility = replace(ONE_DOCUMENT, positions=ROW[:, order])
    shuffled = attention(*(jnp.asarray(x[:, order]) for x in (q, k, v)), jax.tree.map(jnp.asarray, visibility))
    np.testing.assert_allclose(shuffled, slow_attention(q, k, v, ONE_DOCUMENT)[:, order], atol=1e-5)


@settings(max_examples=25)
@given(
    segments=st.lists(st.integers(0, 2), min_size=B * T, max_size=B * T),
    positions=st.lists(st.integers(0, 5), min_size=B * T, max_size=B * T),
    branches=st.none() | st.lists(st.integers(0, 2), min_size=B * T, max_size=B * T),
    forgotten=st.none() | st.lists(st.booleans(), min_size=B * T, max_size=B * T),
    window=st.none() | st.integers(1, 6),
)
def test_the_mask_says_who_sees_whom_and_every_query_sees_itself(segments, positions, branches, forgotten, window):
    segments, positions = (np.int32(values).reshape(B, T) for values in (segments, positions))
    branches = None if branches is None else np.int32(branches).reshape(B, T)
    forgotten = None if forgotten is None else np.array(forgotten).reshape(B, T)
    visibility = Visibility(segments, positions, window, branches, forgotten=forgotten)
    mask = jax.tree.map(jnp.asarray, visibility).mask()
    expected = [[[sees(visibility, b, q, k) for k in range(T)] for q in range(T)] for b in range(B)]
    np.testing.assert_array_equal(mask, expected)
    assert np.asarray(mask)[:, range(T), range(T)].all()


def test_causal_counts_positions_from_0_in_each_segment():
    visibility = causal(jnp.zeros((2, 6), int), jnp.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3]]))
    assert visibility.positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert causal(jnp.zeros((1, 3), int)).positions.tolist() == [[0, 1, 2]]


def test_half_precision_arrays_are_attended_with_float32_softmax():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in qkv()]
    result = attention(*arrays, jax.tree.map(jnp.asarray, ONE_DOCUMENT))
    assert result.dtype == jnp.bfloat16
    expected = slow_attention(*(np.asarray(x, np.float64) for x in arrays), ONE_DOCUMENT)
    np.testing.assert_allclose(np.asarray(result, np.float64), expected, atol=0.02)


# ----------------------------------------------------------------------------------------------------------------- rope


@pytest.mark.parametrize("base", [10_000.0, 640_000.0])
def test_rope_turns_pairs_of_dimensions_as_complex_numbers(base):
    x = qkv()[0]
    positions = np.int32([[0, 1, 2, 3, 0, 1, 2, 900], [5, 4, 3, 2, 1, 0, 70, 8]])
    expected = np.zeros(x.shape)
    for b, t, i in np.ndindex(B, T, d // 2):
        angle = positions[b, t] * base ** (-2 * i / d)
        turned = (x[b, t, :, i] + 1j * x[b, t, :, i + d // 2]) * complex(math.cos(angle), math.sin(angle))
        expected[b, t, :, i], expected[b, t, :, i + d // 2] = turned.real, turned.imag
    np.testing.assert_allclose(rope(jnp.asarray(x), jnp.asarray(positions), base), expected, atol=2e-4)


def test_rope_makes_scores_depend_on_distances_alone_and_keeps_the_dtype():
    q, k, _ = (jnp.asarray(x) for x in qkv(H))

    def scores(shift):
        return jnp.einsum("bqhd,bkhd->bhqk", *(rope(x, jnp.asarray(ROW) + shift, 100.0) for x in (q, k)))

    np.testing.assert_allclose(scores(0), scores(40), atol=1e-4)
    half = q.astype(jnp.bfloat16)
    np.testing.assert_array_equal(rope(half, jnp.zeros((B, T), int), 10_000.0), half, strict=True)
