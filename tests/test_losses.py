"""Cross-entropy against a slow loop."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meap_jax.losses import token_cross_entropy

LOGITS = np.random.default_rng(0).normal(0, 3, (2, 3, 5)).astype(np.float32)
TARGETS = np.array([[0, 4, 2], [1, 1, 3]])


def slow(logits, targets):
    """-log of each target's share of the exponentials, in double precision."""
    loss = np.zeros(targets.shape)
    for index in np.ndindex(targets.shape):
        exponentials = [math.exp(x) for x in logits[index]]
        loss[index] = -math.log(exponentials[targets[index]] / sum(exponentials))
    return loss


def test_loss_is_the_negative_log_probability_of_the_target():
    loss = token_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(TARGETS))
    assert loss.shape == (2, 3) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, slow(LOGITS, TARGETS), rtol=1e-5)


def test_equal_logits_cost_the_log_of_the_vocabulary():
    np.testing.assert_allclose(token_cross_entropy(jnp.full((4, 64), 2.5), jnp.arange(4)), math.log(64), rtol=1e-6)


def test_huge_logits_stay_finite():
    loss = token_cross_entropy(jnp.array([[1e4, 0.0], [1e4, 0.0]]), jnp.array([0, 1]))
    assert loss.tolist() == [0.0, 1e4]


def test_the_gradient_is_the_probabilities_minus_the_target():
    gradient = jax.grad(lambda x: token_cross_entropy(x, jnp.asarray(TARGETS)).sum())(jnp.asarray(LOGITS))
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(gradient, probabilities - np.eye(5)[TARGETS], atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    loss = token_cross_entropy(logits, jnp.asarray(TARGETS))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, slow(np.asarray(logits, np.float64), TARGETS), rtol=1e-5)


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 3, 1)])
def test_logits_and_targets_of_different_shapes_are_refused_with_both(shape):
    with pytest.raises(ValueError, match=r"logits \(2, 3, 5\) and targets \(" + ", ".join(map(str, shape))):
        token_cross_entropy(jnp.asarray(LOGITS), jnp.zeros(shape, int))
