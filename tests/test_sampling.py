"""Which tokens can be chosen, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from meap_jax.sampling import Sampling, choose, filtered, log_probability

LOGITS = np.random.default_rng(0).normal(0, 2, (4, 30)).astype(np.float32)


@given(st.integers(0, 30), st.floats(0.01, 1.0))
def test_what_is_left_is_the_fewest_of_the_most_likely_tokens_that_come_to_top_p(top_k, top_p):
    left = np.asarray(filtered(jnp.asarray(LOGITS), Sampling(1.0, top_k, top_p)))
    for row, logits in zip(left, LOGITS, strict=True):
        order = np.argsort(-logits)
        kept = np.isfinite(row[order])
        n = int(kept.sum())
        assert n >= 1 and kept[:n].all()  # The most likely ones, without a gap.
        candidates = np.exp(logits[order][: top_k or 30].astype(np.float64))
        share = np.cumsum(candidates / candidates.sum())
        assert n == len(share) or share[n - 1] >= top_p - 1e-5
        assert n == 1 or share[n - 2] < top_p + 1e-5


def test_tokens_are_drawn_as_often_as_the_temperature_makes_them_likely():
    logits, never = jnp.asarray([[0.0, 1.0, 2.0, 9.0]]), jnp.array([False, False, False, True])
    keys = jax.random.split(jax.random.key(0), 4_000)
    drawn = jax.vmap(lambda key: choose(logits, never, key[None], Sampling(2.0))[0])(keys)
    expected = np.exp([0, 0.5, 1.0]) / np.exp([0, 0.5, 1.0]).sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4_000, [*expected, 0], atol=0.03)


def test_greedy_takes_the_most_likely_token_that_may_be_chosen():
    never = np.zeros(30, bool)
    never[LOGITS[0].argmax()] = True
    keys = jax.random.split(jax.random.key(0), 4)
    found = choose(jnp.asarray(LOGITS), jnp.asarray(never), keys, Sampling())
    assert found.tolist() == np.where(never, -np.inf, LOGITS).argmax(axis=1).tolist()
    expected = LOGITS[np.arange(4), found] - np.log(np.exp(LOGITS).sum(axis=1))
    np.testing.assert_allclose(log_probability(jnp.asarray(LOGITS), found), expected, rtol=1e-5)
