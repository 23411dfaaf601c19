"""Which positions MEAP masks: how many, which never, how they are drawn."""

import itertools
import math
import random
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from meap_jax.masking import STRATEGIES, mask_tokens, official_masks

MASK = 99
B, T = 4, 24  # One shape for most tests, so that eager operations are compiled once.
IDS = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T) % 50


def draw(seed=0, ids=IDS, ratio=0.25, **kwargs):
    masked_ids, is_masked = mask_tokens(jax.random.key(seed), ids, ratio, mask_id=MASK, **kwargs)
    return np.asarray(masked_ids), np.asarray(is_masked)


def expected_count(num_eligible: int, ratio: float, protect_last: bool = True) -> int:
    """The sentence in the documentation of `mask_tokens`, for one segment."""
    if ratio == 0 or num_eligible == 0:
        return 0
    return min(num_eligible - protect_last, max(1, math.floor(ratio * num_eligible)))


def runs(row) -> list[list[int]]:
    """Positions of a row, grouped into runs of equal ids."""
    return [[i for i, _ in run] for _, run in itertools.groupby(enumerate(row), key=lambda pair: pair[1])]


def assert_spans_whole_but_the_last(is_masked, span_length):
    """`is_masked`: of the candidates of one segment, side by side. Spans may touch, so a run may be several."""
    lengths = [len(list(run)) for value, run in itertools.groupby(is_masked) if value]
    assert all(length % span_length == 0 for length in lengths[:-1])


bits = lambda length: st.lists(st.booleans(), min_size=length, max_size=length)  # noqa: E731
grid = st.lists(bits(T), min_size=B, max_size=B).map(np.array)


# --------------------------------------------------------------------------------------------------------------- count


def test_614_of_4096_at_the_papers_ratio_with_the_papers_mask_id():
    ids = jnp.ones((2, 4096), jnp.int32)
    masked_ids, is_masked = mask_tokens(jax.random.key(0), ids, 0.15)
    assert is_masked.sum(axis=1).tolist() == [614, 614]
    assert (masked_ids == 32_000).sum(axis=1).tolist() == [614, 614]
    assert not is_masked[:, -1].any()


@settings(max_examples=60)
@given(
    eligible=grid,
    cuts=grid,
    ratio=st.one_of(st.floats(0, 1), st.sampled_from([0, 1, 0.05, 0.1, 0.15, 0.2, 0.5])),
    protect_last=st.booleans(),
    strategy=st.sampled_from(["random", "span", "shared"]),
    span_length=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_every_segment_has_exactly_its_count_and_only_eligible_positions(
    eligible, cuts, ratio, protect_last, strategy, span_length, seed
):
    segment_ids = np.cumsum(cuts, axis=1) % 3  # Ids may come back: a segment is a run.
    masked_ids, is_masked = draw(
        seed,
        ratio=ratio,
        eligible=jnp.asarray(eligible),
        segment_ids=jnp.asarray(segment_ids),
        protect_last=protect_last,
        strategy=strategy,
        span_length=span_length,
    )
    assert masked_ids.dtype == IDS.dtype and is_masked.dtype == bool
    np.testing.assert_array_equal(masked_ids, np.where(is_masked, MASK, IDS))
    assert not (is_masked & ~eligible).any()
    for row in range(B):
        for segment in runs(segment_ids[row]):
            positions = [i for i in segment if eligible[row, i]]
            chosen = is_masked[row, positions]
            assert chosen.sum() == expected_count(len(positions), ratio, protect_last)
            if protect_last and positions:
                assert not chosen[-1]
            if strategy == "span":
                assert_spans_whole_but_the_last(chosen, span_length)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_masked_at_ratio_0(strategy):
    masked_ids, is_masked = draw(ratio=0.0, strategy=strategy)
    assert not is_masked.any()
    np.testing.assert_array_equal(masked_ids, IDS)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_everything_but_the_last_is_masked_at_ratio_1(strategy):
    _, is_masked = draw(ratio=1.0, strategy=strategy)
    np.testing.assert_array_equal(is_masked, np.broadcast_to(np.arange(T) < T - 1, (B, T)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_everything_is_masked_at_ratio_1_without_protection(strategy):
    assert draw(ratio=1.0, strategy=strategy, protect_last=False)[1].all()


def test_a_segment_of_one_eligible_position_is_masked_only_without_protection():
    eligible = jnp.zeros((B, T), bool).at[:, 5].set(True)
    assert draw(eligible=eligible)[1].sum() == 0
    assert draw(eligible=eligible, protect_last=False)[1].sum() == B


def test_the_last_eligible_position_is_never_masked_though_padding_follows():
    eligible = jnp.broadcast_to(jnp.arange(T) < 10, (B, T))
    hits = sum(draw(seed, ratio=0.9, eligible=eligible)[1].astype(int) for seed in range(20))
    assert (hits[:, :9] > 0).all() and (hits[:, 9:] == 0).all()


# -------------------------------------------------------------------------------------------------------------- chance


def assert_uniform(counts, num_outcomes, quantile):
    """Pearson's chi-square against equal frequencies; `quantile` is that of the distribution at 1 - 1e-5."""
    expected = sum(counts.values()) / num_outcomes
    seen = sum((count - expected) ** 2 for count in counts.values()) / expected
    missing = (num_outcomes - len(counts)) * expected
    assert seen + missing < quantile


def test_every_candidate_position_is_hit_equally_often():
    _, is_masked = draw(ids=jnp.zeros((4000, 16), jnp.int32), ratio=0.25)  # 4 of 15 candidates.
    hits = is_masked.sum(axis=0)
    mean, deviation = 4000 * 4 / 15, math.sqrt(4000 * 4 / 15 * 11 / 15)
    assert hits[-1] == 0
    assert np.abs(hits[:-1] - mean).max() < 4.5 * deviation


def test_every_subset_is_drawn_equally_often():
    _, is_masked = draw(ids=jnp.zeros((6000, 5), jnp.int32), ratio=0.4)  # 2 of 4 candidates: 6 subsets.
    assert_uniform(Counter(map(tuple, is_masked)), num_outcomes=6, quantile=30.9)


def test_every_arrangement_of_spans_is_drawn_equally_often():
    # Three of six positions as a span of two and one cut to one: 4 + 3 + 2 + 1 arrangements.
    _, is_masked = draw(
        ids=jnp.zeros((6000, 6), jnp.int32), ratio=0.5, protect_last=False, strategy="span", span_length=2
    )
    arrangements = Counter(tuple(np.flatnonzero(row).tolist()) for row in is_masked)
    assert set(arrangements) == {(i, i + 1, j) for i in range(4) for j in range(i + 2, 6)}
    assert_uniform(arrangements, num_outcomes=10, quantile=39.3)


@pytest.mark.parametrize("strategy", ["random", "span", "bernoulli"])
def test_rows_are_drawn_independently(strategy):
    _, is_masked = draw(ids=jnp.zeros((2000, 41), jnp.int32), ratio=0.25, strategy=strategy)
    assert len({tuple(row) for row in is_masked}) > 1900
    # Two independent rows share (share of a position)^2 of the candidates, however a row is drawn.
    first, second = is_masked[::2, :-1], is_masked[1::2, :-1]
    overlap, expected = (first & second).mean(), (first.mean(axis=0) * second.mean(axis=0)).mean()
    assert abs(overlap - expected) < 0.006  # More than 4 standard deviations of 1,000 pairs.


def test_keys_change_the_draw_and_the_same_key_repeats_it():
    assert (draw(0)[1] != draw(1)[1]).any()
    np.testing.assert_array_equal(draw(0)[1], draw(0)[1])


def test_token_ids_do_not_change_the_draw():
    np.testing.assert_array_equal(draw(ids=IDS)[1], draw(ids=IDS[::-1])[1])


# ---------------------------------------------------------------------------------------------------------- strategies


@pytest.mark.parametrize("span_length", [1, 2, 5, 50])
def test_spans_are_whole_but_the_last_which_is_cut_to_the_exact_count(span_length):
    _, is_masked = draw(
        ids=jnp.zeros((100, 200), jnp.int32), ratio=0.15, strategy="span", span_length=span_length, protect_last=False
    )
    assert (is_masked.sum(axis=1) == 30).all()
    for row in is_masked:
        assert_spans_whole_but_the_last(row, span_length)


def test_spans_run_over_candidates_and_skip_what_is_not_eligible():
    eligible = jnp.broadcast_to(jnp.arange(T) % 2 == 0, (B, T))  # 12 eligible, 11 candidates, 6 masked.
    _, is_masked = draw(ratio=0.5, strategy="span", span_length=6, eligible=eligible)
    for row in is_masked:
        assert np.diff(np.flatnonzero(row)).tolist() == [2] * 5


def test_bernoulli_masks_each_candidate_with_the_ratio_and_no_exact_count():
    _, is_masked = draw(ids=jnp.zeros((400, 101), jnp.int32), ratio=0.15, strategy="bernoulli")
    counts = is_masked.sum(axis=1)
    assert not is_masked[:, -1].any()
    assert abs(counts.mean() - 15) < 4.5 * math.sqrt(15 * 0.85 / 400)
    assert 0.75 < counts.var() / (15 * 0.85) < 1.25


def test_shared_is_one_draw_for_all_rows():
    _, is_masked = draw(strategy="shared")
    assert (is_masked == is_masked[0]).all()
    assert (is_masked != draw(1, strategy="shared")[1]).any()


# -------------------------------------------------------------------------------------------------- transformed by JAX


@jax.jit
def with_traced_ratio(rng, ids, ratio, eligible):
    return mask_tokens(rng, ids, ratio, mask_id=MASK, eligible=eligible)[1]


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.15, 0.2])
def test_a_traced_ratio_gives_the_mask_of_a_python_ratio_at_every_length_up_to_512(ratio):
    ids = jnp.zeros((512, 512), jnp.int32)
    eligible = jnp.arange(512) <= jnp.arange(512)[:, None]  # Row i has i + 1 eligible positions.
    python = draw(ids=ids, ratio=ratio, eligible=eligible)[1]
    percent = round(100 * ratio)
    assert python.sum(axis=1).tolist() == [min(n - 1, max(1, n * percent // 100)) for n in range(1, 513)]
    np.testing.assert_array_equal(with_traced_ratio(jax.random.key(0), ids, ratio, eligible), python)


def test_a_sweep_over_ratios_traces_once():
    num_traces = 0

    @jax.jit
    def masked(ratio):
        nonlocal num_traces
        num_traces += 1
        return mask_tokens(jax.random.key(0), IDS, ratio, mask_id=MASK)[1]

    for ratio in (0.0, 0.05, 0.1, 0.15, 0.2):
        np.testing.assert_array_equal(masked(jnp.float32(ratio)), draw(ratio=ratio)[1])
    assert num_traces == 1


ROWS = jnp.zeros((8, 16), jnp.int32)
SEGMENTS = jnp.broadcast_to(jnp.arange(16) // 7, ROWS.shape)
ELIGIBLE = jnp.broadcast_to(jnp.arange(16) % 5 != 3, ROWS.shape)


def all_strategies(rng, ids, segment_ids, eligible):
    return [
        mask_tokens(rng, ids, 0.4, mask_id=MASK, segment_ids=segment_ids, eligible=eligible, strategy=s, span_length=2)
        for s in STRATEGIES
    ]


@pytest.fixture(scope="module")
def eager():
    return all_strategies(jax.random.key(3), ROWS, SEGMENTS, ELIGIBLE)


def test_jit_changes_nothing(eager):
    jax.tree.map(np.testing.assert_array_equal, jax.jit(all_strategies)(jax.random.key(3), ROWS, SEGMENTS, ELIGIBLE), eager)


@pytest.mark.parametrize(
    "spec",
    [PartitionSpec(("a", "b")), PartitionSpec("a"), PartitionSpec("a", "b"), PartitionSpec(None, ("b", "a"))],
    ids=["rows over 8", "rows over 4", "rows over 4, positions over 2", "positions over 8"],
)
def test_the_draw_is_the_same_on_8_devices_however_the_batch_is_sharded(eager, spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    batch, everywhere = NamedSharding(mesh, spec), NamedSharding(mesh, PartitionSpec())
    sharded = jax.jit(all_strategies, in_shardings=(everywhere, batch, batch, batch), out_shardings=batch)
    masks = sharded(jax.random.key(3), ROWS, SEGMENTS, ELIGIBLE)
    assert len(masks[0][1].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, masks, eager)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_vmap_over_keys_is_a_loop_over_keys(strategy):
    keys = jax.random.split(jax.random.key(0), 3)
    mask = lambda key: mask_tokens(key, IDS, 0.25, mask_id=MASK, strategy=strategy)  # noqa: E731
    together = jax.vmap(mask)(keys)
    for i, key in enumerate(keys):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, i=i: x[i], together), mask(key))


# ------------------------------------------------------------------------------------------------------ official masks


@pytest.fixture
def global_random():
    """The official code reseeds CPython's global generator; put it back afterwards."""
    state = random.getstate()
    yield random
    random.setstate(state)


@pytest.mark.parametrize("seq_len, ratio", [(4096, 0.15), (512, 0.1), (20, 0.02)])
def test_official_masks_are_those_of_the_official_code_bit_for_bit(global_random, seq_len, ratio):
    masks = official_masks(seq_len, ratio)
    assert masks.shape == (51, seq_len) and masks.dtype == bool
    for step in range(51):
        global_random.seed(50 + step % 51)
        positions = global_random.sample(range(seq_len - 1), max(1, int(seq_len * ratio)))
        assert sorted(positions) == np.flatnonzero(masks[step]).tolist()


def test_official_masks_have_614_of_4096_each_and_leave_global_randomness_alone():
    state = random.getstate()
    masks = official_masks(4096, 0.15)
    assert random.getstate() == state
    assert masks.sum(axis=1).tolist() == [614] * 51
    # What paper and code don't say: every position is hit by some mask but the last, position 0 by four.
    hits = masks.sum(axis=0)
    assert hits[0] == 4 and hits[-1] == 0 and (hits[:-1].min(), hits.max()) == (1, 18)


def test_official_masks_mask_nothing_at_ratio_0():
    assert not official_masks(16, 0.0).any()


# -------------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize("ratio", [-0.1, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32])
def test_a_ratio_outside_0_to_1_is_refused_with_its_value(ratio, kind):
    with pytest.raises(ValueError, match=rf"ratio must be .*\[0, 1\], got {str(kind(ratio))[:4]}"):
        draw(ratio=kind(ratio))


@pytest.mark.parametrize("ratio", [-0.1, 1.5, math.nan])
def test_official_masks_refuse_a_ratio_outside_0_to_1(ratio):
    with pytest.raises(ValueError, match=f"{ratio}"):
        official_masks(16, ratio)


def test_official_masks_refuse_more_masks_than_positions():
    with pytest.raises(ValueError, match="ratio 1.0 asks for 16 masks, but only 15 of 16"):
        official_masks(16, 1.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(ids=IDS.astype(jnp.float32)), r"ids must be integers .* got float32\[4, 24\]"),
        (dict(ids=IDS[0]), r"ids must be .*\[B, T\], got int32\[24\]"),
        (dict(ids=IDS[None]), r"got int32\[1, 4, 24\]"),
        (dict(eligible=jnp.ones((B, T - 1), bool)), r"eligible must have the shape \[4, 24\] of ids, got \[4, 23\]"),
        (dict(segment_ids=jnp.ones(T, int)), r"segment_ids must have the shape \[4, 24\] of ids, got \[24\]"),
        (dict(ratio=jnp.full(B, 0.1)), r"ratio must be a scalar"),
        (dict(strategy="blocks"), r"strategy must be one of random, span, bernoulli, shared, got 'blocks'"),
        (dict(strategy="span", span_length=0), r"span_length must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_with_their_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(**arguments)


@pytest.mark.parametrize("ratio", [1.5, math.nan])
def test_a_bad_python_ratio_is_refused_under_jit_too(ratio):
    with pytest.raises(ValueError, match=f"{ratio}"):
        jax.jit(lambda ids: mask_tokens(jax.random.key(0), ids, ratio))(IDS)
