"""Documents of many lengths become blocks of one length."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meap_jax.data import plans

lengths_of_documents = st.lists(st.integers(1, 40), max_size=30)


def numbered(lengths):
    """Documents with numbers that are not their places, and their lengths."""
    return np.arange(len(lengths)) * 3 + 1, np.array(lengths, np.int64)


def ids_of(plan, block):
    """The (document, place in it) of each id of a block."""
    pieces = plan.pieces[plan.bounds[block] : plan.bounds[block + 1]]
    return [(int(d), int(s) + i) for d, s, n in pieces.tolist() for i in range(n)]


@settings(max_examples=100, deadline=None)
@given(lengths_of_documents, st.integers(1, 20))
def test_concat_is_one_stream_in_order_cut_into_blocks_without_its_tail(lengths, block_len):
    documents, lengths = numbered(lengths)
    plan = plans.concat(documents, lengths, block_len)
    stream = [(int(d), i) for d, n in zip(documents, lengths, strict=True) for i in range(n)]
    assert len(plan) == len(stream) // block_len
    cut = [stream[i * block_len : (i + 1) * block_len] for i in range(len(plan))]
    assert [ids_of(plan, i) for i in range(len(plan))] == cut


@settings(max_examples=50, deadline=None)
@given(lengths_of_documents, st.integers(2, 20))
def test_best_fit_loses_no_id_and_cuts_only_documents_that_are_longer_than_a_block(lengths, block_len):
    documents, lengths = numbered(lengths)
    plan = plans.best_fit(documents, lengths, block_len)
    assert all(len(ids_of(plan, i)) <= block_len for i in range(len(plan)))
    found = Counter(plan.pieces["document"].tolist())
    expected = {int(d): -(-int(n) // block_len) for d, n in zip(documents, lengths, strict=True)}
    assert found == Counter(expected)
    ids = sorted(i for block in range(len(plan)) for i in ids_of(plan, block))
    assert ids == [(int(d), i) for d, n in zip(documents, lengths, strict=True) for i in range(n)]


def test_best_fit_fills_the_fullest_block_that_has_room():
    plan = plans.best_fit(np.arange(4), np.array([6, 8, 2, 4]), 10)
    blocks = [plan.pieces["document"][plan.bounds[i] : plan.bounds[i + 1]].tolist() for i in range(len(plan))]
    assert blocks == [[0, 3], [1, 2]]


def test_best_fit_pads_little_where_documents_are_short(monkeypatch):
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1, 3000).astype(np.int64) + 2, 2000)
    packed = plans.best_fit(np.arange(3000), lengths, 2048)
    assert plans.statistics(packed, np.arange(3000), lengths, 2048)["padding_share"] < 0.02
    # Ranges of documents are packed by themselves: where the next one begins depends on no document of this one.
    monkeypatch.setattr(plans, "_RANGE", 1000)
    ranges = plans.best_fit(np.arange(3000), lengths, 2048)
    first = plans.best_fit(np.arange(1000), lengths[:1000], 2048)
    np.testing.assert_array_equal(ranges.pieces[: len(first.pieces)], first.pieces)


def test_a_part_of_a_plan_has_its_blocks():
    documents, lengths = numbered([7, 5, 9, 4, 8])
    plan = plans.concat(documents, lengths, 4)
    part = plan.part(2, 5)
    assert [ids_of(part, i) for i in range(len(part))] == [ids_of(plan, i) for i in range(2, 5)]


def test_statistics_are_what_a_count_gives():
    documents, lengths = numbered([7, 5, 9, 3])
    concat = plans.statistics(plans.concat(documents, lengths, 10), documents, lengths, 10)
    assert concat == {
        "documents": 4, "blocks": 2, "tokens": 20, "mean_document_tokens": 6.0, "padding_share": 0.0,
        "cut_documents": 3, "dropped_tokens": 4,
    }  # fmt: skip
    fit = plans.statistics(plans.best_fit(documents, lengths, 10), documents, lengths, 10)
    assert (fit["cut_documents"], fit["dropped_tokens"], fit["blocks"]) == (0, 0, 3)
    assert fit["padding_share"] == pytest.approx(1 - 24 / 30)


@settings(max_examples=50, deadline=None)
@given(lengths_of_documents, st.integers(0, 200))
def test_the_first_tokens_end_with_the_document_that_reaches_them(lengths, most):
    documents, lengths = numbered(lengths)
    kept = plans.first_tokens(documents, lengths, most)
    np.testing.assert_array_equal(kept, documents[: len(kept)])
    if most and len(kept) < len(documents):
        assert lengths[: len(kept)].sum() >= most
    if most and len(kept):
        assert lengths[: len(kept) - 1].sum() < most


def test_short_documents_are_dropped_at_random_and_long_ones_never():
    documents, lengths = np.arange(20_000) * 2, np.tile([100, 5000], 10_000)
    kept = plans.keep_long(documents, lengths, long_from=4096, keep_shorter=0.1, seed=0)
    is_long = lengths[kept // 2] >= 4096
    assert is_long.sum() == 10_000
    assert (~is_long).sum() == pytest.approx(1000, abs=120)
    np.testing.assert_array_equal(kept, plans.keep_long(documents, lengths, long_from=4096, keep_shorter=0.1, seed=0))
    other = plans.keep_long(documents, lengths, long_from=4096, keep_shorter=0.1, seed=1)
    assert not np.array_equal(kept, other)
