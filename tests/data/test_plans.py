"""Documents of many lengths become blocks of one length."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meap_jax.data import plans

lengths_of_documents = st.lists(st.integers(1, 40), max_size=30)
sizes_of_ranges = st.integers(1, 12)


def ranges_of(lengths, size=10):
    """Documents with numbers that are not their places, in ranges of a size, an empty one among them."""
    numbers = np.arange(len(lengths)) * 3 + 1
    slices = plans.whole(numbers, np.array(lengths, np.int64))
    return [slices[:0], *(slices[i : i + size] for i in range(0, len(slices), size))]


def blocks_of(planned):
    """The (document, place in it) of each id of each block, all plans together."""
    blocks = []
    for plan in planned:
        for i in range(len(plan)):
            slices = plan.slices[plan.bounds[i] : plan.bounds[i + 1]].tolist()
            blocks.append([(d, s + j) for d, s, n in slices for j in range(n)])
    return blocks


def stream_of(lengths):
    return [(i * 3 + 1, j) for i, n in enumerate(lengths) for j in range(n)]


@given(lengths_of_documents, st.integers(1, 20), sizes_of_ranges)
def test_concat_is_one_stream_in_order_cut_into_blocks_without_its_tail(lengths, block_len, size):
    stream = stream_of(lengths)
    cut = [stream[i : i + block_len] for i in range(0, len(stream) - block_len + 1, block_len)]
    assert blocks_of(plans.concat(ranges_of(lengths, size), block_len)) == cut


def test_a_range_may_have_more_ids_than_32_bits_count():
    [plan] = plans.concat([plans.whole(np.arange(3), np.full(3, 2**31))], 2**30)
    assert len(plan) == 6
    assert (plan.slices["length"] == 2**30).all() and plan.slices["document"].tolist() == [0, 0, 1, 1, 2, 2]


@given(lengths_of_documents, st.integers(2, 20), sizes_of_ranges)
def test_best_fit_loses_no_id_and_cuts_only_documents_that_are_longer_than_a_block(lengths, block_len, size):
    planned = list(plans.best_fit(ranges_of(lengths, size), block_len))
    blocks = blocks_of(planned)
    assert all(0 < len(block) <= block_len for block in blocks)
    assert sorted(sum(blocks, [])) == stream_of(lengths)
    found = Counter(document for plan in planned for document in plan.slices["document"].tolist())
    assert found == {i * 3 + 1: -(-n // block_len) for i, n in enumerate(lengths)}


def test_best_fit_fills_the_fullest_block_that_has_room():
    [plan] = plans.best_fit([plans.whole(np.arange(4), np.array([6, 8, 2, 4]))], 10)
    blocks = [plan.slices["document"][plan.bounds[i] : plan.bounds[i + 1]].tolist() for i in range(len(plan))]
    assert blocks == [[0, 3], [1, 2]]


def test_best_fit_pads_little_where_documents_are_short(tmp_path):
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1, 3000).astype(np.int64) + 2, 2000)
    planned = plans.best_fit([plans.whole(np.arange(3000), lengths)], 2048)
    assert plans.save(tmp_path, "train", planned, lengths, 2048)["padding_share"] < 0.02


def test_consecutive_blocks_of_a_plan_are_a_plan():
    plan = next(plans.concat([plans.whole(np.arange(5), np.array([7, 5, 9, 4, 8]))], 4))
    assert blocks_of([plan.between(2, 5)]) == blocks_of([plan])[2:5]


@given(lengths_of_documents, st.integers(1, 20), sizes_of_ranges)
def test_a_saved_plan_is_those_of_the_ranges_in_order(tmp_path_factory, lengths, block_len, size):
    folder = tmp_path_factory.mktemp("plan")
    by_number = np.zeros(3 * len(lengths) + 2, np.int64)
    by_number[1 : 3 * len(lengths) + 1 : 3] = lengths
    planned = list(plans.concat(ranges_of(lengths, size), block_len))
    counts = plans.save(folder, "train", planned, by_number, block_len)
    assert blocks_of([plans.load(folder, "train")]) == blocks_of(planned)
    assert counts["blocks"] == len(blocks_of(planned))


def test_a_saved_plan_has_its_counts(tmp_path):
    lengths = np.array([7, 5, 9, 3])
    documents = [plans.whole(np.arange(4), lengths)]
    assert plans.save(tmp_path, "a", plans.concat(documents, 10), lengths, 10) == {
        "blocks": 2, "tokens": 20, "documents": 3, "cut_documents": 2, "padding_share": 0.0,
    }  # fmt: skip
    fit = plans.save(tmp_path, "b", plans.best_fit(documents, 10), lengths, 10)
    assert (fit["blocks"], fit["documents"], fit["cut_documents"]) == (3, 4, 0)
    assert fit["padding_share"] == pytest.approx(1 - 24 / 30)


@given(lengths_of_documents, st.integers(0, 200), sizes_of_ranges)
def test_the_first_tokens_end_with_the_document_that_reaches_them(lengths, most, size):
    kept = [d for slices in plans.first_tokens(ranges_of(lengths, size), most) for d in slices["document"].tolist()]
    assert kept == [i * 3 + 1 for i in range(len(kept))]
    if not most:
        assert len(kept) == len(lengths)
    elif len(kept) < len(lengths):
        assert sum(lengths[: len(kept)]) >= most
    if most and kept:
        assert sum(lengths[: len(kept) - 1]) < most


def test_short_documents_are_dropped_at_random_and_long_ones_never():
    slices = plans.whole(np.arange(20_000), np.tile([100, 4096], 10_000))
    ranges = [slices[:10_000], slices[10_000:]]

    def kept(seed):
        return np.concatenate(list(plans.keep_long(ranges, long_from=4096, keep_shorter=0.1, seed=seed)))

    is_long = kept(0)["length"] >= 4096
    assert is_long.sum() == 10_000
    assert (~is_long).sum() == pytest.approx(1000, abs=120)
    np.testing.assert_array_equal(kept(0), kept(0))
    assert not np.array_equal(kept(0), kept(1))
    short = kept(0)["document"][~is_long]
    assert set(short[short < 10_000]) != set(short[short >= 10_000] - 10_000)  # Each range has draws of its own.
