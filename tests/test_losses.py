"""Cross-entropy against a slow loop, and in chunks against itself all at once."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from meap_jax.losses import linear_cross_entropy, token_losses
from tiny_models import mesh_of

LOGITS = np.random.default_rng(0).normal(0, 3, (2, 3, 5)).astype(np.float32)
TARGETS = np.array([[0, 4, 2], [1, 1, 3]])


def slow(logits, targets):
    """-log of each target's share of the exponentials, in double precision."""
    loss = np.zeros(targets.shape)
    for index in np.ndindex(targets.shape):
        exponentials = [math.exp(x) for x in logits[index]]
        loss[index] = -math.log(exponentials[targets[index]] / sum(exponentials))
    return loss


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_loss_is_the_negative_log_probability_of_the_target_in_float32(dtype):
    logits = jnp.asarray(LOGITS, dtype)
    losses = token_losses(logits, jnp.eye(5), jnp.asarray(TARGETS))  # Such a head gives these logits.
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, slow(np.asarray(logits, np.float64), TARGETS), rtol=1e-5)


def test_huge_logits_stay_finite():
    x, head, targets = jnp.full((1, 2, 1), 1e2), jnp.array([[1e2, 0.0]]), jnp.array([[0, 1]])
    assert token_losses(x, head, targets).tolist() == [[0.0, 1e4]]
    assert linear_cross_entropy(x, head, targets, jnp.ones((1, 2))) == 1e4


# ------------------------------------------------------------------------------------------------- from hidden states

B, T, D, V = 4, 12, 6, 32
RNG = np.random.default_rng(1)
X = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
HEAD = jnp.asarray(RNG.normal(size=(D, V)), jnp.float32)
WORDS = jnp.asarray(RNG.integers(0, V, (B, T)), jnp.int32)
WEIGHTS = jnp.asarray(RNG.uniform(size=(B, T)) * (RNG.uniform(size=(B, T)) > 0.2), jnp.float32)


def all_at_once(x, head, targets, weights, z_loss=0.0):
    """All logits at once, in float32."""
    logits = x.astype(jnp.float32) @ head
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum((cross_entropy(logits, targets) + z_loss * log_z**2) * weights)


def assert_equal_to_all_at_once(z_loss=0.0, **options):
    def chunked(x, head):
        return linear_cross_entropy(x, head, WORDS, WEIGHTS, z_loss=z_loss, **options)

    loss, gradients = jax.jit(jax.value_and_grad(lambda x, head: 0.5 * chunked(x, head), (0, 1)))(X, HEAD)
    expected = jax.value_and_grad(lambda x, head: 0.5 * all_at_once(x, head, WORDS, WEIGHTS, z_loss), (0, 1))(X, HEAD)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), (loss, gradients), expected)
    np.testing.assert_allclose(jax.jit(chunked)(X, HEAD), 2 * expected[0], rtol=1e-5)  # Without a gradient, too.
    of_tokens = jax.jit(functools.partial(token_losses, **options))(X, HEAD, WORDS)
    np.testing.assert_allclose(of_tokens, cross_entropy(X @ HEAD, WORDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk_size", [0, 1, 7, 16, 48, 1000])  # 7 does not divide the 48 positions.
def test_chunks_give_the_loss_and_the_gradient_of_all_at_once(chunk_size, z_loss):
    assert_equal_to_all_at_once(chunk_size=chunk_size, z_loss=z_loss)


@pytest.mark.parametrize(
    "sizes",
    [dict(data=2), dict(tensor=4), dict(context=2), dict(data=2, fsdp=2, tensor=2), dict(tensor=2, context=2)],
    ids=str,
)
def test_a_mesh_with_the_vocabulary_over_tensor_changes_nothing(sizes):
    with jax.set_mesh(mesh_of(**sizes)):
        assert_equal_to_all_at_once(chunk_size=5, z_loss=0.01)


def test_bfloat16_hidden_states_give_gradients_in_their_dtype_and_the_heads():
    x = X.astype(jnp.bfloat16)
    loss_and_gradients = functools.partial(jax.value_and_grad(linear_cross_entropy, (0, 1)), chunk_size=0)
    # By default XLA leaves roundings to bfloat16 out where it can, and with them the mistake of rounding.
    exactly = jax.jit(loss_and_gradients, compiler_options={"xla_allow_excess_precision": False})
    loss, (d_x, d_head) = exactly(x, HEAD, WORDS, WEIGHTS)
    assert (loss.dtype, d_x.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert (d_head != d_head.astype(jnp.bfloat16)).any()
    rounded = HEAD.astype(jnp.bfloat16).astype(jnp.float32)
    expected, gradients = jax.value_and_grad(all_at_once, (0, 1))(x.astype(jnp.float32), rounded, WORDS, WEIGHTS)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.05), (d_x, d_head), gradients
    )


def test_no_more_than_a_chunk_of_logits_is_ever_held():
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((2, 1024, 16), jnp.float32), ((16, 4096), jnp.float32), ((2, 1024), jnp.int32), ((2, 1024), jnp.float32)
    )]  # fmt: skip

    def temporaries(loss):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunked = temporaries(functools.partial(linear_cross_entropy, chunk_size=64))
    assert chunked < temporaries(all_at_once) / 5
    assert chunked < 2048 * 4096 * 4  # Bytes of all logits.
