"""Scores of packed requests are those of the whole forward pass of each alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meap_jax import scoring
from meap_jax.errors import DataError
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.model.visibility import causal
from meap_jax.models import Model
from meap_jax.scoring import Scorer
from tiny_models import mesh_of, numbers
from tiny_runs import tiny_config

RNG = np.random.default_rng(0)
V = 64


def tokens(n):
    return RNG.integers(4, V, n).tolist()


# Contexts that several continuations share, one of a single token, long ones, continuations of one token.
SHARED = [tokens(20), tokens(1), tokens(45), tokens(33)]
REQUESTS = [(SHARED[i % 4], tokens(1 + 3 * i % 17)) for i in range(19)]


def opened(mesh=None, **changes):
    config = tiny_config(**{"seq_len": 96, **changes})
    model = Model(config, mesh_of(**(mesh or {})), define(ModelConfig.of(config.model, "cpu")))
    return model, jax.device_put(numbers(model.definition), model.definition.shardings(model.mesh))


def scores_of(scorer, params, requests):
    found = {}
    for who, scores in scorer.score(params, requests):
        found |= dict(zip(who, scores, strict=True))
    assert sorted(found) == list(range(len(requests)))
    return [found[i] for i in range(len(requests))]


@functools.cache
def program(definition):
    return jax.jit(lambda params, text: definition.apply(params, text, causal(text))[0].astype(jnp.float32))


def logits_of(model, params, text):
    """[T, V] of a text; what pads it to one length comes behind it."""
    return np.array(program(model.definition)(params, jnp.asarray([text + [0] * (96 - len(text))])))[: len(text)]


def alone(model, params, context, continuation, num_tokens=0):
    logits = logits_of(model, params, [*context, *continuation])
    logits[:, num_tokens or V :] = -np.inf
    log_probs = np.array(jax.nn.log_softmax(logits))[len(context) - 1 : -1]
    chosen = log_probs[np.arange(len(continuation)), continuation]
    return chosen.sum(), bool((chosen == log_probs.max(axis=1)).all())


@pytest.mark.parametrize(
    "mesh, changes",
    [
        ({}, {}),
        ({}, {"model.tie_embeddings": True, "model.num_tokens": 60, "model.window": 9}),
        (dict(data=2, fsdp=2, tensor=2), {"model.num_kv_heads": 1}),
        (dict(data=2, context=2), {}),
    ],
    ids=str,
)
def test_scores_are_those_of_each_request_alone(mesh, changes):
    model, params = opened(mesh, **changes)
    num_tokens = changes.get("model.num_tokens", 0)
    requests = [(c, np.minimum(k, (num_tokens or V) - 1).tolist()) for c, k in REQUESTS]
    found = scores_of(Scorer(model, batch_size=2), params, requests)
    plain, _ = opened({}, **changes)
    whole = jax.device_put(jax.device_get(params), jax.devices()[0])
    for (context, continuation), score in zip(requests, found, strict=True):
        expected, _ = alone(plain, whole, context, continuation, num_tokens)
        assert score.log_prob == pytest.approx(expected, abs=1e-4, rel=1e-4)


def test_a_bfloat16_model_has_float32_scores():
    model, params = opened(**{"model.dtype": "bfloat16"})
    for (context, continuation), score in zip(REQUESTS, scores_of(Scorer(model), params, REQUESTS), strict=True):
        expected, _ = alone(model, params, context, continuation)
        assert score.log_prob == pytest.approx(expected, rel=1e-2)
        assert score.log_prob != float(jnp.bfloat16(score.log_prob))


def test_greedy_is_what_the_model_would_write():
    model, params = opened()
    requests = []
    for context in SHARED:
        text = list(context)
        for _ in range(4):
            text.append(int(logits_of(model, params, text)[-1].argmax()))
        greedy = text[len(context) :]
        requests += [(context, greedy), (context, [*greedy[:3], (greedy[3] + 1) % V]), (context, greedy[:1])]
    found = scores_of(Scorer(model), params, requests)
    assert [score.is_greedy for score in found] == [True, False, True] * 4


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=30), st.integers(1, 4))
def test_every_request_gets_its_tokens_and_its_own_places(sizes, batch_size):
    model = opened()[0]
    requests = [(SHARED[c], tokens(n)) for c, n in sizes]
    scorer, seen = Scorer(model, batch_size=batch_size), []
    for packed in scorer._packed(requests):
        for i, row, first, stop in packed.requests:
            context, continuation = requests[i]
            seen.append(i)
            assert packed.targets[row, first:stop].tolist() == list(continuation)
            *_, last = at = packed.at[row, first:stop]
            # What the last position sees is the context and what it continues, in order.
            v = jax.tree.map(lambda x, row=row: jnp.asarray(x[row : row + 1]), packed.visibility)
            sees = np.array(v.mask())[0, last]
            order = np.argsort(packed.visibility.positions[row][sees], kind="stable")
            assert packed.tokens[row][sees][order].tolist() == [*context, *continuation[:-1]]
            assert packed.tokens[row, at].tolist() == [context[-1], *continuation[:-1]]
    assert sorted(seen) == list(range(len(requests)))


def test_a_context_is_read_once_for_all_its_continuations():
    model = opened()[0]
    requests = [(SHARED[2], tokens(3)) for _ in range(10)]
    [packed] = Scorer(model, batch_size=1)._packed(requests)
    assert (packed.visibility.segment_ids > 0).sum() == 45 + 10 * 2


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_a_long_request_loses_the_left_end_of_its_context_and_no_more(n, m, seq_len):
    context, continuation = list(range(n)), list(range(100, 100 + m))
    found = scoring.left_truncated((context, continuation), seq_len)
    if m > seq_len:
        assert found is None
        return
    assert found is not None
    own, same = found
    assert same == continuation and own == context[n - len(own) :]
    assert len(own) == n if n + m <= seq_len + 1 else len(own) + m == seq_len + 1


def test_requests_that_do_not_fit_are_refused():
    model, params = opened()
    for request in ((tokens(90), tokens(8)), ([], tokens(2)), (tokens(2), [])):
        with pytest.raises(DataError, match="request 0 has .* both together at most 97"):
            list(Scorer(model).score(params, [request]))
    scores_of(Scorer(model), params, [(tokens(90), tokens(7))])
    assert scoring._SHORTEST_ROW > 96  # Rows may be longer than a text: what counts is a text's own length.
