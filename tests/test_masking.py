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
B, T = 8, 16  # One shape for what runs eagerly, so that its operations are compiled once.
IDS = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T) % 50
COMPILED = jax.jit(mask_tokens, static_argnames=("mask_id", "protect_last", "strategy", "span_length"))


def draw(seed=0, ids=IDS, ratio=0.25, function=mask_tokens, **kwargs):
    masked_ids, is_masked = function(jax.random.key(seed), ids, ratio, mask_id=MASK, **kwargs)
    return np.asarray(masked_ids), np.asarray(is_masked)


def draw_rows(num_eligible=16, **kwargs):
    """Thousands of rows at once: [4000, num_eligible] bool."""
    shape = (4000, 16)
    eligible = jnp.broadcast_to(jnp.arange(16) < num_eligible, shape)
    return draw(ids=jnp.zeros(shape, jnp.int32), eligible=eligible, function=COMPILED, **kwargs)[1][:, :num_eligible]


def expected_count(num_eligible: int, ratio: float, protect_last: bool) -> int:
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


# ---------------------------------------------------------------------------------------------------------------- count


def test_614_of_4096_at_the_papers_ratio_with_the_papers_mask_id():
    ids = jnp.ones((2, 4096), jnp.int32)
    masked_ids, is_masked = jax.jit(lambda rng: mask_tokens(rng, ids, 0.15))(jax.random.key(0))
    assert is_masked.sum(axis=1).tolist() == [614, 614]
    assert (masked_ids == 32_000).sum(axis=1).tolist() == [614, 614]
    assert not is_masked[:, -1].any()


WAYS = (
    dict(),
    dict(protect_last=False),
    dict(strategy="shared"),
    dict(strategy="span", span_length=3),
    dict(strategy="span", span_length=2, protect_last=False),
)


@jax.jit
def in_all_ways(rng, ratio, eligible, segment_ids):
    return [
        mask_tokens(rng, IDS, ratio, mask_id=MASK, eligible=eligible, segment_ids=segment_ids, **way) for way in WAYS
    ]


grid = st.integers(0, 2 ** (B * T) - 1).map(lambda n: np.array([n >> i & 1 for i in range(B * T)], bool).reshape(B, T))


@settings(max_examples=60)
@given(
    eligible=grid,
    cuts=grid,
    few_cuts=grid,
    ratio=st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 1.0, 0.05, 0.15, 0.5])).map(np.float32),
    seed=st.integers(0, 99),
)
def test_every_segment_has_exactly_its_count_and_only_eligible_positions(eligible, cuts, few_cuts, ratio, seed):
    segment_ids = np.cumsum(cuts & few_cuts, axis=1) % 3  # Ids may come back: a segment is a run.
    results = in_all_ways(jax.random.key(seed), ratio, eligible, segment_ids)
    for way, (masked_ids, is_masked) in zip(WAYS, jax.tree.map(np.asarray, results), strict=True):
        assert masked_ids.dtype == IDS.dtype and is_masked.dtype == bool
        np.testing.assert_array_equal(masked_ids, np.where(is_masked, MASK, IDS))
        assert not (is_masked & ~eligible).any()
        protect_last = way.get("protect_last", True)
        for row in range(B):
            for segment in runs(segment_ids[row]):
                positions = [i for i in segment if eligible[row, i]]
                chosen = is_masked[row, positions]
                assert chosen.sum() == expected_count(len(positions), ratio, protect_last)
                if protect_last and positions:
                    assert not chosen[-1]
                if "span_length" in way:
                    assert_spans_whole_but_the_last(chosen, way["span_length"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_masked_at_ratio_0_and_all_that_may_be_at_ratio_1(strategy):
    assert not draw(ratio=0.0, strategy=strategy)[1].any()
    assert (draw(ratio=1.0, strategy=strategy)[1] == (np.arange(T) < T - 1)).all()
    assert draw(ratio=1.0, strategy=strategy, protect_last=False)[1].all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_ratio_for_each_row_gives_each_row_the_mask_of_its_own_ratio(strategy):
    ratios = jnp.float32([0.0, 0.1, 0.25, 0.4, 0.5, 0.75, 0.9, 1.0])
    for shape in ((B,), (B, 1)):
        masks = draw(ratio=ratios.reshape(shape), strategy=strategy, function=COMPILED)[1]
        for row, ratio in enumerate(ratios):
            np.testing.assert_array_equal(masks[row], draw(ratio=ratio, strategy=strategy, function=COMPILED)[1][row])
    if strategy != "bernoulli":
        assert masks.sum(axis=1).tolist() == [expected_count(T, float(ratio), True) for ratio in ratios]


def test_official_masks_have_one_ratio():
    with pytest.raises(ValueError, match="ratio must be a scalar"):
        official_masks(B, jnp.full(B, 0.1))


# --------------------------------------------------------------------------------------------------------------- chance


def assert_uniform(counts, num_outcomes, quantile):
    """Pearson's chi-square against equal frequencies; `quantile` is that of the distribution at 1 - 1e-5."""
    expected = sum(counts.values()) / num_outcomes
    seen = sum((count - expected) ** 2 for count in counts.values()) / expected
    missing = (num_outcomes - len(counts)) * expected
    assert seen + missing < quantile


def test_every_candidate_position_is_hit_equally_often():
    hits = draw_rows(ratio=0.25).sum(axis=0)  # 4 of 15 candidates.
    mean, deviation = 4000 * 4 / 15, math.sqrt(4000 * 4 / 15 * 11 / 15)
    assert hits[-1] == 0
    assert np.abs(hits[:-1] - mean).max() < 4.5 * deviation


def test_every_subset_is_drawn_equally_often():
    is_masked = draw_rows(num_eligible=5, ratio=0.4)  # 2 of 4 candidates: 6 subsets.
    assert_uniform(Counter(map(tuple, is_masked.tolist())), num_outcomes=6, quantile=30.9)


def test_every_arrangement_of_spans_is_drawn_equally_often():
    # Three of six positions as a span of two and one cut to one: 4 + 3 + 2 + 1 arrangements.
    is_masked = draw_rows(num_eligible=6, ratio=0.5, protect_last=False, strategy="span", span_length=2)
    arrangements = Counter(tuple(np.flatnonzero(row).tolist()) for row in is_masked)
    assert set(arrangements) == {(i, i + 1, j) for i in range(4) for j in range(i + 2, 6)}
    assert_uniform(arrangements, num_outcomes=10, quantile=39.3)


@pytest.mark.parametrize(
    "way", [dict(), dict(strategy="bernoulli"), dict(strategy="span", span_length=2, protect_last=False)], ids=str
)
def test_rows_are_drawn_independently(way):
    is_masked = draw_rows(ratio=0.25, **way)
    # Two independent rows share (frequency of a position)^2 of its draws, whatever the positions of one row do.
    overlap = (is_masked[::2] & is_masked[1::2]).mean()
    assert abs(overlap - np.square(is_masked.mean(axis=0)).mean()) < 0.008  # 4.5 standard deviations or more.


def test_the_key_alone_decides_the_draw():
    assert (draw(0)[1] != draw(1)[1]).any()
    np.testing.assert_array_equal(draw(0)[1], draw(0, ids=IDS[::-1])[1])


# ----------------------------------------------------------------------------------------------------------- strategies


def test_bernoulli_masks_each_candidate_with_the_ratio_and_no_exact_count():
    is_masked = draw_rows(ratio=0.25, strategy="bernoulli")
    counts, variance = is_masked.sum(axis=1), 15 * 0.25 * 0.75
    assert not is_masked[:, -1].any()
    assert abs(counts.mean() - 15 * 0.25) < 4.5 * math.sqrt(variance / 4000)
    assert 0.9 < counts.var() / variance < 1.1  # 4.5 standard deviations.


def test_shared_is_one_draw_for_all_rows():
    _, is_masked = draw(strategy="shared")
    assert (is_masked == is_masked[0]).all()
    assert (is_masked != draw(1, strategy="shared")[1]).any()


# --------------------------------------------------------------------------------------------------- transformed by JAX


def test_a_traced_ratio_gives_the_mask_of_a_python_ratio_at_every_length_up_to_512():
    ids = jnp.zeros((512, 512), jnp.int32)
    eligible = jnp.arange(512) <= jnp.arange(512)[:, None]  # Row i has i + 1 eligible positions.

    def masks(*ratios):
        return [mask_tokens(jax.random.key(0), ids, r, eligible=eligible)[1] for r in ratios]

    ratios = (0.05, 0.1, 0.15, 0.2)
    python = jax.jit(lambda: masks(*ratios))()
    traced = jax.jit(masks)(*ratios)
    for percent, python_mask, traced_mask in zip((5, 10, 15, 20), python, traced, strict=True):
        assert python_mask.sum(axis=1).tolist() == [min(n - 1, max(1, n * percent // 100)) for n in range(1, 513)]
        np.testing.assert_array_equal(traced_mask, python_mask)


SEGMENTS = jnp.broadcast_to(jnp.arange(T) // 7, IDS.shape)
ELIGIBLE = jnp.broadcast_to(jnp.arange(T) % 5 != 3, IDS.shape)


def all_strategies(rng, ids=IDS, segment_ids=SEGMENTS, eligible=ELIGIBLE):
    return [
        mask_tokens(rng, ids, 0.4, mask_id=MASK, segment_ids=segment_ids, eligible=eligible, strategy=s, span_length=2)
        for s in STRATEGIES
    ]


@pytest.fixture(scope="module")
def eager():
    return all_strategies(jax.random.key(3))


def test_jit_changes_nothing(eager):
    jax.tree.map(np.testing.assert_array_equal, jax.jit(all_strategies)(jax.random.key(3)), eager)


def test_vmap_over_keys_is_a_loop_over_keys(eager):
    keys = jnp.stack([jax.random.key(7), jax.random.key(3)])
    together = jax.jit(jax.vmap(all_strategies))(keys)
    loop = [all_strategies(keys[0]), eager]
    jax.tree.map(lambda x, *rows: np.testing.assert_array_equal(x, np.stack(rows)), together, *loop)


@pytest.mark.parametrize(
    "spec",
    [PartitionSpec(("a", "b")), PartitionSpec("b"), PartitionSpec("a", "b")],
    ids=["rows over 8", "rows over 2", "rows over 4 and positions over 2"],
)
def test_the_draw_is_the_same_on_8_devices_however_the_batch_is_sharded(eager, spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    batch, everywhere = NamedSharding(mesh, spec), NamedSharding(mesh, PartitionSpec())
    sharded = jax.jit(all_strategies, in_shardings=(everywhere, batch, batch, batch), out_shardings=batch)
    masks = sharded(jax.random.key(3), IDS, SEGMENTS, ELIGIBLE)
    assert len(masks[0][1].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, masks, eager)


# ------------------------------------------------------------------------------------------------------- official masks


@pytest.mark.parametrize("seq_len, ratio", [(4096, 0.15), (512, 0.1), (20, 0.02)])
def test_official_masks_are_those_of_the_official_code_bit_for_bit(seq_len, ratio):
    before = random.getstate()
    masks = official_masks(seq_len, ratio)
    assert masks.shape == (51, seq_len) and masks.dtype == bool and random.getstate() == before
    for step in range(51):  # The official code reseeds CPython's global generator.
        random.seed(50 + step % 51)
        positions = random.sample(range(seq_len - 1), max(1, int(seq_len * ratio)))
        assert sorted(positions) == np.flatnonzero(masks[step]).tolist()
    random.setstate(before)


def test_official_masks_hit_every_position_but_the_last_and_nothing_at_ratio_0():
    # What paper and code don't say: position 0 is hit by four of the 51 masks.
    hits = official_masks(4096, 0.15).sum(axis=0)
    assert hits[0] == 4 and hits[-1] == 0 and (hits[:-1].min(), hits.max()) == (1, 18)
    assert not official_masks(16, 0.0).any()


# -------------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize("ratio", [-0.1, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32])
def test_a_ratio_outside_0_to_1_is_refused_with_its_value(ratio, kind):
    with pytest.raises(ValueError, match=rf"ratio must be .*\[0, 1\], got {str(kind(ratio))[:4]}"):
        draw(ratio=kind(ratio))


def test_official_masks_and_masks_under_jit_refuse_such_a_ratio_too():
    for function in (lambda: official_masks(16, 1.5), jax.jit(lambda: mask_tokens(jax.random.key(0), IDS, 1.5))):
        with pytest.raises(ValueError, match=r"ratio must be a scalar in \[0, 1\], got 1.5"):
            function()
    with pytest.raises(ValueError, match="ratio 1.0 asks for 16 masks, but only 15 of 16"):
        official_masks(16, 1.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(ids=IDS.astype(jnp.float32)), r"ids must be integers .* got float32\[8, 16\]"),
        (dict(ids=IDS[0]), r"ids must be .*\[B, T\] with T >= 1, got int32\[16\]"),
        (dict(ids=IDS[None]), r"got int32\[1, 8, 16\]"),
        (dict(eligible=jnp.ones((B, T - 1), bool)), r"eligible must have the shape \[8, 16\] of ids, got \[8, 15\]"),
        (dict(segment_ids=jnp.ones(T, int)), r"segment_ids must have the shape \[8, 16\] of ids, got \[16\]"),
        (dict(ratio=jnp.full(B - 1, 0.1)), r"ratio must be a number for each row in \[0, 1\], got \[0.1 0.1"),
        (dict(ratio=jnp.full((1, B), 0.1)), r"ratio must be a number for each row in \[0, 1\], got"),
        (dict(ratio=np.linspace(0, 1.5, B)), r"ratio must be a number for each row in \[0, 1\], got \[0. "),
        (dict(strategy="blocks"), r"strategy must be one of random, span, bernoulli, shared, got 'blocks'"),
        (dict(strategy="span", span_length=0), r"span_length must be a whole number from 1 on, got 0"),
        (dict(strategy="span", span_length=2.5), r"span_length must be a whole number from 1 on, got 2.5"),
        (dict(ids=IDS[:, :0]), r"ids must be .*T >= 1, got int32\[8, 0\]"),
        (dict(ids=[[1, 2]]), r"ids must be an array, got \[\[1, 2\]\]"),
        (dict(ratio="0.1"), r"ratio must be a scalar in \[0, 1\], got 0.1"),
    ],
)
def test_bad_arguments_are_refused_with_their_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(**arguments)


def test_ids_keep_their_dtype_and_a_mask_id_that_it_cannot_hold_is_refused():
    assert mask_tokens(jax.random.key(0), IDS.astype(jnp.uint16), 0.15)[0].dtype == jnp.uint16
    with pytest.raises(ValueError, match="mask_id must be .* int8, can hold, got 32000"):
        mask_tokens(jax.random.key(0), IDS.astype(jnp.int8), 0.15)
