"""Which input tokens MEAP hides, and what the decoder sees in their place.

The whole idea of the paper in one file that depends on nothing but JAX: copy it into your own trainer and call
`mask_tokens` on the *inputs*, inside the jitted step and outside anything rematerialised. Targets stay clean.

MEAP: "Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More", ICML 2025,
https://arxiv.org/abs/2502.07490, section 3.
"""

import numbers
import random
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# [MASK] is appended to Llama's 32,000 pieces (official code, MEAP-Pretain/pretrained/meap_1b.py).
PAPER_MASK_ID = 32_000
STRATEGIES = ("random", "span", "bernoulli", "shared")
OFFICIAL_CYCLE = 51  # The official code reseeds with 50 + step % 51, so there are only 51 masks.


def mask_tokens(
    rng: jax.Array,
    ids: jax.Array,
    ratio: float | jax.Array,
    *,
    mask_id: int = PAPER_MASK_ID,
    eligible: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    protect_last: bool = True,
    strategy: str = "random",
    span_length: int = 5,
) -> tuple[jax.Array, jax.Array]:
    """Replaces a fraction of the input tokens by `[MASK]` (MEAP, https://arxiv.org/abs/2502.07490, section 3).

    In every row (every segment of a row, where `segment_ids` are given) with N eligible positions, exactly
    `min(N - 1, max(1, floor(ratio * N)))` positions are masked, without replacement and independently of other rows;
    none where `ratio` is 0. The last eligible position is never masked, as in the official pre-training code. With
    `protect_last=False` it may be, and the count is `min(N, max(1, floor(ratio * N)))`, as in the official fine-tuning
    code (MEAP-SFT/MEAP-SFT.py). A row of 4,096 at ratio 0.15 has 614 masked positions.

    Beware: mask the inputs only. Targets, and the loss on every position, stay those of next-token prediction; neither
    paper nor official code protects bos or eos, so pass `eligible` if you want to. Draw the mask for the global batch
    before it is split into micro-batches, and outside `jax.checkpoint`.

    Args:
      rng: PRNG key. The draw depends on the key and the global shape alone, not on how the batch is sharded.
      ids: [B, T] integer token ids.
      ratio: fraction in [0, 1], a Python number or a scalar array (traced: a sweep over ratios compiles once), or one
        for each row, [B] or [B, 1]. A Python number is multiplied by N in double precision, an array in float32.
      mask_id: the id that masked tokens are replaced by.
      eligible: [B, T] bool, where a mask may fall; False for padding and whatever else the caller protects. Default:
        everywhere.
      segment_ids: [B, T] integers; a segment is a run of equal ids. Default: a row is one segment.
      protect_last: never mask the last eligible position of a segment.
      strategy: "random" (the paper); "span" (Table 15): the same exact count in whole spans of `span_length` candidates
        that do not overlap, the last one cut to fit; "bernoulli": each candidate by itself with probability `ratio`, no
        exact count; "shared": one random draw for all rows.
      span_length: positions in a span; the paper tries 5 and 50. Only "span" reads it.

    Returns:
      (masked_ids, is_masked): [B, T] of the dtype of `ids`, and [B, T] bool.

    Raises:
      ValueError: for ids that are not [B, T] integers with T >= 1, a mask_id that their dtype can't hold, masks of
        another shape, an unknown strategy, a span length that is not a whole number from 1 on, ratios of another shape
        or outside [0, 1] (if they are known while tracing).
    """
    _check(ids, ratio, mask_id, eligible, segment_ids, strategy, span_length)
    B, T = ids.shape
    ratio = jnp.asarray(ratio).reshape(B, 1) if np.ndim(ratio) else ratio
    eligible = jnp.ones((B, T), bool) if eligible is None else eligible.astype(bool)
    segment_ids = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids

    # Randomness: one 32-bit word a position.
    rows = 1 if strategy == "shared" else B
    bits_BxT = jnp.broadcast_to(jax.random.bits(rng, (rows, T), jnp.uint32), (B, T))

    # Candidates: the eligible positions of each segment, without its last one if that is protected.
    group_BxT = jnp.cumsum(segment_ids != jnp.roll(segment_ids, 1, axis=1).at[:, 0].set(segment_ids[:, 0]), axis=1)
    size_BxT = _per_group(jax.ops.segment_sum, eligible.astype(jnp.int32), group_BxT)
    position = jnp.broadcast_to(jnp.arange(T), (B, T))
    last_BxT = _per_group(jax.ops.segment_max, jnp.where(eligible, position, -1), group_BxT)
    candidate_BxT = eligible & (position != last_BxT) if protect_last else eligible

    # Selection: as many of them as the ratio asks for.
    if strategy == "bernoulli":
        is_masked = candidate_BxT & _bernoulli(bits_BxT, ratio)
    else:
        quota_BxT = _quota(size_BxT, ratio, T, protect_last)
        choose = _choose if strategy != "span" else lambda *row: _choose_spans(*row, span_length=span_length)
        is_masked = jax.vmap(choose)(bits_BxT, candidate_BxT, group_BxT, quota_BxT)
    return jnp.where(is_masked, jnp.asarray(mask_id, ids.dtype), ids), is_masked


def official_masks(seq_len: int, ratio: float) -> np.ndarray:
    """The 51 masks of the official pre-training code, bit for bit; row `step % 51` masks every sequence of that step.

    From MEAP-Pretain/pretrained/meap_1b.py: CPython's `random.seed(50 + step % 51)` followed by
    `random.sample(range(seq_len - 1), max(1, int(seq_len * ratio)))`, shared by all rows, micro-batches and ranks.

    Args:
      seq_len: T, the length of the inputs; at least 2.
      ratio: fraction of masked positions in [0, 1].

    Returns:
      [51, T] bool. All False where the ratio is 0.

    Raises:
      ValueError: for a ratio outside [0, 1], or one that asks for more positions than the T - 1 that the code masks.
    """
    _check_ratio(ratio)
    masks = np.zeros((OFFICIAL_CYCLE, seq_len), bool)
    if ratio == 0:
        return masks
    count = max(1, int(seq_len * ratio))
    if count > seq_len - 1:
        raise ValueError(
            f"ratio {ratio} asks for {count} masks, but only {seq_len - 1} of {seq_len} positions can be masked"
        )
    for cycle in range(OFFICIAL_CYCLE):
        masks[cycle, random.Random(50 + cycle).sample(range(seq_len - 1), count)] = True
    return masks


def _quota(size: jax.Array, ratio: float | jax.Array, T: int, protect_last: bool) -> jax.Array:
    """The exact number of masks for a group of `size` eligible positions."""
    if isinstance(ratio, numbers.Real):
        # Python's own floor(ratio * N), from a table: 0.29 * 100 is 28.999... in double precision, 29 in single.
        count = jnp.asarray(np.floor(float(ratio) * np.arange(T + 1)), jnp.int32)[size]
    else:
        count = jnp.floor(jnp.asarray(ratio, jnp.float32) * size).astype(jnp.int32)
    count = jnp.minimum(jnp.maximum(count, 1), size - 1 if protect_last else size)
    return jnp.where(ratio > 0, count, 0)


def _choose(bits: jax.Array, candidate: jax.Array, group: jax.Array, quota: jax.Array) -> jax.Array:
    """Picks exactly `quota` of the candidates of each group of one row, all subsets equally likely; [T] -> bool [T]."""
    T = bits.shape[0]
    position = jnp.arange(T)
    # Sorted by random bits within each group (non-candidates last, as a group of their own), the first `quota` win.
    key = jnp.where(candidate, group, T)
    sorted_key, _, sorted_position = lax.sort((key, bits, position), num_keys=2)
    starts_group = sorted_key != jnp.roll(sorted_key, 1).at[0].set(-1)
    rank = position - lax.cummax(jnp.where(starts_group, position, 0))
    wins = (rank < quota[sorted_position]) & (sorted_key < T)
    return jnp.zeros(T, bool).at[sorted_position].set(wins)


def _choose_spans(
    bits: jax.Array, candidate: jax.Array, group: jax.Array, quota: jax.Array, *, span_length: int
) -> jax.Array:
    """Picks `quota` candidates of each group of one row in spans; all [T] -> bool [T].

    A group's candidates, side by side, are cut into items: spans, and single positions between them. Every order of
    items is equally likely. Spans are whole; the last one in the row is cut so that the count is exact.
    """
    T = bits.shape[0]
    position = jnp.arange(T)
    group_size = jax.ops.segment_sum(candidate.astype(jnp.int32), group, T)
    num_candidates = group_size[group]
    num_spans = -(-quota // span_length)
    num_items = num_candidates - quota + num_spans

    # Slot j of a group is its j-th candidate; its first `num_items` slots represent the items in order.
    slot = _exclusive_rank(candidate, group)
    is_item = candidate & (slot < num_items)
    is_span = _choose(bits, is_item, group, num_spans)
    span_rank = _exclusive_rank(is_span, group)
    cut_length = quota - (num_spans - 1) * span_length
    length = jnp.where(is_span, jnp.where(span_rank == num_spans - 1, cut_length, span_length), is_item)

    # An item that starts at slot s and has length n covers slots s ... s + n - 1. Slots of all groups in one line:
    # +1 where a span starts, -1 where it ends, and the running sum is positive where a slot is covered.
    line_start = jnp.cumsum(group_size) - group_size
    start = line_start[group] + _exclusive_sum(length, group)
    edges = jnp.zeros(T + 1, jnp.int32)
    edges = edges.at[jnp.where(is_span, start, T)].add(1).at[jnp.where(is_span, start + length, T)].add(-1)
    covered = jnp.cumsum(edges) > 0
    return candidate & covered[jnp.where(candidate, line_start[group] + slot, position)]


def _exclusive_sum(values: jax.Array, group: jax.Array) -> jax.Array:
    """Sum of the values before each position, within its group; groups are runs; [T] -> [T]."""
    before = jnp.cumsum(values) - values
    starts_group = group != jnp.roll(group, 1).at[0].set(-1)
    return before - lax.cummax(jnp.where(starts_group, before, 0))


def _exclusive_rank(mask: jax.Array, group: jax.Array) -> jax.Array:
    """The number of True before each position, within its group; [T] bool -> [T] int."""
    return _exclusive_sum(mask.astype(jnp.int32), group)


def _per_group(reduction: Callable[..., jax.Array], values: jax.Array, group: jax.Array) -> jax.Array:
    """Reduces [B, T] values over the groups of each row and gives every position its group's result."""
    T = values.shape[1]
    return jax.vmap(lambda v, g: reduction(v, g, num_segments=T)[g])(values, group)


def _bernoulli(bits: jax.Array, ratio: float | jax.Array) -> jax.Array:
    """True with probability `ratio`, from the upper 24 bits: exactly never at 0 and always at 1."""
    uniform = (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)  # [0, 1)
    return uniform < ratio


def _check_ratio(ratio: float | jax.Array, *shapes_of_rows: tuple[int, ...]) -> None:
    """Takes a scalar, or an array of one of the other shapes."""
    if isinstance(ratio, numbers.Real | np.ndarray | jax.Array) and np.shape(ratio) in ((), *shapes_of_rows):
        if isinstance(ratio, jax.core.Tracer) or ((np.asarray(ratio) >= 0) & (np.asarray(ratio) <= 1)).all():
            return
    what = "a number for each row" if shapes_of_rows and np.ndim(ratio) else "a scalar"
    raise ValueError(f"ratio must be {what} in [0, 1], got {ratio}")


def _check(
    ids: jax.Array,
    ratio: float | jax.Array,
    mask_id: int,
    eligible: jax.Array | None,
    segment_ids: jax.Array | None,
    strategy: str,
    span_length: int,
) -> None:
    for name, array in (("ids", ids), ("eligible", eligible), ("segment_ids", segment_ids)):
        if array is not None and not isinstance(array, np.ndarray | jax.Array):
            raise ValueError(f"{name} must be an array, got {array!r}")
    shape, dtype = ids.shape, ids.dtype
    if len(shape) != 2 or shape[1] < 1 or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"ids must be integers of shape [B, T] with T >= 1, got {dtype}{list(shape)}")
    if isinstance(mask_id, numbers.Integral) and not jnp.iinfo(dtype).min <= mask_id <= jnp.iinfo(dtype).max:
        raise ValueError(f"mask_id must be a number that the dtype of ids, {dtype}, can hold, got {mask_id}")
    for name, array in (("eligible", eligible), ("segment_ids", segment_ids)):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} must have the shape {list(shape)} of ids, got {list(array.shape)}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if strategy == "span" and not (isinstance(span_length, numbers.Integral) and span_length >= 1):
        raise ValueError(f"span_length must be a whole number from 1 on, got {span_length}")
    _check_ratio(ratio, shape[:1], (shape[0], 1))
