"""What a batch becomes under an objective: next-token prediction (NTP), MEAP, and what it is compared with.

All of them are NTP in which some *input* positions, the gaps, are hidden: none (ntp), behind `[MASK]` (meap), behind a
random token (random_tokens) or a zero embedding (token_dropout), or from all later positions (fcm). `mir` adds MEAP's
loss to that of clean inputs. With one mask key all but fcm hide the same positions. `dropout` hides none, but drops
hidden states. Targets are always the clean next tokens, and the loss covers every target that is not padding.

In fine-tuning rows come with weights for answers alone, and with copies of answers: gaps are in copies only, and of a
copy only the tokens that were replaced are targets. Under NTP nothing is, and a copy counts as any other answer.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key

from meap_jax.config import seed_of
from meap_jax.errors import ConfigError
from meap_jax.fields import SEEDS
from meap_jax.masking import OFFICIAL_CYCLE, mask_tokens, official_masks
from meap_jax.model.dropout import Dropout
from meap_jax.model.visibility import Visibility, causal
from meap_jax.rows import AnyArray, Row


@dataclasses.dataclass(frozen=True)
class Objective:
    """The static settings of an objective: the fields `objective.*` of a config, and the size of the vocabulary."""

    name: str
    mask_ratio: float
    strategy: str
    span_length: int
    mask_id: int
    vocab_size: int
    ramp_from: float | None = None  # None: the ratio is mask_ratio all along.
    ramp_begin: float = 0.0
    ramp_end: float = 1.0
    num_steps: int = 1  # Of the run, which the ramp's ends are shares of.
    ratio_per_row: bool = False  # Each row's ratio is drawn from 0 to that of the step.
    where: str = "all"  # Data says it of each token, as `Row.maskable`.
    masked_weight: float = 0.4  # Of the loss on masked inputs, under mir.
    has_static_masks: bool = False  # Data says where the masks of copies are; else they are drawn in each step.
    rows_per_mean: int = 0  # 0: the loss is a mean over all targets; else over each so many rows, then over the means.

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> "Objective":
        """Makes the objective of a run's config; NTP has the ratio 0.

        Raises:
          ConfigError: an objective that is not registered.
        """
        fields = config.objective.to_dict()
        if fields["name"] not in OBJECTIVES:
            raise ConfigError(f"objective.name is {fields['name']!r}, but must be one of {', '.join(OBJECTIVES)}.")
        if fields["name"] == "ntp":
            fields |= {"mask_ratio": 0.0, "ramp_from": None}
        sft = dict(has_static_masks=config.sft.masks == "static", rows_per_mean=config.sft.rows_per_mean)
        return cls(vocab_size=config.model.vocab_size, num_steps=config.num_steps, **sft, **fields)

    @property
    def num_passes(self) -> int:
        """Forward and backward passes over each row of data: 2 where its masked copy follows, else 1."""
        is_masked = self.mask_ratio > 0 or self.ramp_from is not None
        return 2 if self.name == "mir" and self.masked_weight > 0 and is_masked else 1

    def ratio_at(self, step: Int[Array, ""]) -> float | Float[Array, ""]:
        """The mask ratio of a step, counted from 0: a Python number where it is the same in all of them."""
        if self.ramp_from is None:
            return self.mask_ratio
        begin, end = (share * self.num_steps for share in (self.ramp_begin, self.ramp_end))
        done = jnp.clip((step - begin) / (end - begin), 0.0, 1.0)
        return jnp.asarray(self.ramp_from + done * (self.mask_ratio - self.ramp_from), jnp.float32)


class Inputs(NamedTuple):
    """Inputs and targets of the decoder; one axis more in front where micro-batches are stacked."""

    tokens: Int32[Array, "*micro B T"]  # Corrupted.
    targets: Int32[Array, "*micro B T"]  # The clean next tokens.
    loss_weights: Float32[Array, "*micro B T"]  # 0 where the target is padding.
    is_masked: Bool[Array, "*micro B T"]  # The gaps.
    segment_ids: Int32[Array, "*micro B T"] | None  # As in `Row`; so are the next three.
    positions: Int32[Array, "*micro B T"] | None = None
    rope_positions: Int32[Array, "*micro B T"] | None = None
    branch_ids: Int32[Array, "*micro B T"] | None = None
    keep_embedding: Bool[Array, "*micro B T"] | None = None  # False where the embedding is dropped; None: all kept.
    forgotten: Bool[Array, "*micro B T"] | None = None  # Keys that no later query sees; None: all are seen.
    dropout: Dropout | None = None  # Of hidden states; None: none.
    is_masked_copy: Bool[Array, "*micro B 1"] | None = None  # Rows that repeat the one before with gaps; None: none do.

    @property
    def clean_weights(self) -> Float32[Array, "*micro B T"]:
        """The loss weights without those of masked copies: their sum is what a loss is divided by."""
        return (
            self.loss_weights if self.is_masked_copy is None else jnp.where(self.is_masked_copy, 0, self.loss_weights)
        )

    @property
    def visibility(self) -> Visibility:
        """Which positions each position attends to."""
        visibility = causal(self.tokens, self.segment_ids)
        positions = visibility.positions if self.positions is None else self.positions
        return dataclasses.replace(
            visibility,
            positions=positions,
            branch_ids=self.branch_ids,
            rope_positions=self.rope_positions,
            forgotten=self.forgotten,
        )


# --------------------------------------------------------------------------------------------------- the objectives

# A mask ratio: a number, or one for each row.
Ratio = float | Float[Array, ""] | Float[Array, "B 1"]
# (clean inputs whose `is_masked` says where the gaps are, the ratio, the step's key for noise, the objective) -> inputs
# with something in the gaps.
Corruption = Callable[[Inputs, Ratio, jax.Array, "Objective"], Inputs]


def put_mask(clean: Inputs, ratio: Ratio, key: jax.Array, objective: Objective) -> Inputs:
    """Puts [MASK] in the gaps."""
    return clean._replace(tokens=jnp.where(clean.is_masked, objective.mask_id, clean.tokens))


def put_random_tokens(clean: Inputs, ratio: Ratio, key: jax.Array, objective: Objective) -> Inputs:
    """Puts any token but [MASK] in the gaps: this control must not contain the treatment."""
    noise = jax.random.randint(key, clean.tokens.shape, 0, objective.vocab_size - 1, jnp.int32)
    noise += noise >= objective.mask_id
    return clean._replace(tokens=jnp.where(clean.is_masked, noise, clean.tokens))


def drop_embeddings(clean: Inputs, ratio: Ratio, key: jax.Array, objective: Objective) -> Inputs:
    """Sets the embeddings in the gaps to zero; others are not scaled up, so that nothing else differs."""
    return clean._replace(keep_embedding=~clean.is_masked)


def add_masked_copies(clean: Inputs, ratio: Ratio, key: jax.Array, objective: Objective) -> Inputs:
    """Lets a copy with [MASK] in the gaps follow each row: MIR, https://arxiv.org/abs/2606.08888.

    The loss is that of clean inputs plus `masked_weight` times that of masked ones, each over all targets: 1 and 0.4
    in the paper, whose ratio is drawn from 0 to 0.5 for each row (`mask_ratio` and `ratio_per_row`). A copy without
    gaps has no weight, so that the ratio 0 is NTP even where it is traced.

    Returns:
      2 B rows: each copy behind its row, which on a mesh is on the same device.
    """
    if not objective.masked_weight:
        return clean._replace(is_masked=jnp.zeros_like(clean.is_masked))
    gaps, is_copy = clean.is_masked, jnp.ones((len(clean.tokens), 1), bool)
    weights = jnp.where(gaps.any(axis=1, keepdims=True), objective.masked_weight * clean.loss_weights, 0)
    rows = (
        clean._replace(is_masked=jnp.zeros_like(gaps), is_masked_copy=~is_copy),
        put_mask(clean, ratio, key, objective)._replace(loss_weights=weights, is_masked_copy=is_copy),
    )
    return jax.tree.map(lambda *pair: jnp.stack(pair, axis=1).reshape(-1, pair[0].shape[1]), *rows)


def forget(clean: Inputs, ratio: Ratio, key: jax.Array, objective: Objective) -> Inputs:
    """Lets no later position attend to the gaps: forgetful causal masking, https://arxiv.org/abs/2210.13432.

    As there, a forgotten token is the same in all layers, and the first token of a text is never forgotten. There it
    is the first of a row and here that of each document, for no document sees another. There each token is forgotten
    by itself, with one probability a row that is drawn from 0 to 0.15 or so: `objective.strategy=bernoulli` with
    `objective.ratio_per_row`; by default a count is exact here. And a position always attends to itself here, so that
    the token whose successor is asked for is known.
    """
    return clean._replace(forgotten=clean.is_masked)


def drop_hidden_states(clean: Inputs, ratio: Ratio, key: jax.Array, objective: Objective) -> Inputs:
    """Drops hidden states with the ratio as probability, where `meap_jax.model.dropout` says; there are no gaps."""
    rows = (len(clean.tokens), 1)
    rates = jnp.broadcast_to(jnp.asarray(ratio, jnp.float32), rows)
    dropout = Dropout(jax.random.bits(key, rows, jnp.uint32), rates)
    return clean._replace(dropout=dropout, is_masked=jnp.zeros_like(clean.is_masked))


# What `objective.name` may be. NTP has no gaps, unless a sweep over ratios gives it some.
OBJECTIVES: dict[str, Corruption] = {
    "ntp": put_mask,
    "meap": put_mask,
    "mir": add_masked_copies,
    "random_tokens": put_random_tokens,
    "token_dropout": drop_embeddings,
    "fcm": forget,
    "dropout": drop_hidden_states,
}
# Those that put tokens into gaps and do nothing else: one program can train them all, with `filler` of `make_inputs`.
FILLERS = ("meap", "random_tokens")


def named_keys(config: ml_collections.ConfigDict) -> dict[str, Key[Array, ""]]:
    """Makes a key for each use: init, data, mask, noise. `seed` gives all four, `seeds.mask` that of masks alone."""
    return {name: jax.random.fold_in(jax.random.key(seed_of(config, name)), i) for i, name in enumerate(SEEDS)}


def clean_inputs(row: Row) -> Inputs:
    """Makes the inputs of plain next-token prediction from a batch of rows, [B, L] each with L = T + 1."""
    inputs, targets = (jax.tree.map(lambda x, cut=cut: x[:, cut], row) for cut in (slice(-1), slice(1, None)))
    weights = jnp.ones(targets.tokens.shape, jnp.float32) if targets.loss_weights is None else targets.loss_weights
    if targets.segment_ids is not None:
        weights = jnp.where(targets.segment_ids != 0, weights, 0.0)
    return Inputs(
        tokens=inputs.tokens,
        targets=targets.tokens,
        loss_weights=weights,
        is_masked=jnp.zeros_like(inputs.tokens, bool),
        segment_ids=inputs.segment_ids,
        positions=inputs.positions,
        rope_positions=inputs.rope_positions,
        branch_ids=inputs.branch_ids,
    )


def make_inputs(
    row: Row,
    objective: Objective,
    keys: dict[str, Key[Array, ""]],
    step: Int[Array, ""],
    ratio: Float[Array, ""] | None = None,
    filler: Int[Array, ""] | None = None,
) -> Inputs:
    """Makes the inputs of one step from the whole global batch, before it is cut into micro-batches; not under remat.

    Args:
      row: a batch of rows, [B, L] with L = T + 1. Padding is never masked.
      objective: what replaces the gaps, and where they are.
      keys: "mask" draws the positions and the ratios of rows, "noise" what replaces them; the step is folded into both.
      step: scalar int, counted from 0.
      ratio: replaces the objective's mask ratio; may be traced, so that a sweep compiles once.
      filler: a place in FILLERS, whose objective fills the gaps in place of this one; may be traced too.

    Returns:
      As many rows, or under mir twice as many.

    Raises:
      ConfigError: for a ratio where the official strategy or static masks are made for the objective's own.
    """
    if ratio is not None and objective.strategy == "official":
        raise ConfigError(
            "objective.strategy is 'official', which masks with objective.mask_ratio only: sweep another."
        )
    if ratio is not None and objective.has_static_masks and row.is_copy is not None:
        raise ConfigError("sft.masks is 'static', which masks with objective.mask_ratio only: sweep with fresh masks.")
    inputs = clean_inputs(row)
    fraction = objective.ratio_at(step) if ratio is None else ratio
    is_zero = isinstance(fraction, float) and fraction == 0
    # Under NTP a copy is a sample like any other; under other objectives one without masks has no targets.
    has_gaps = not is_zero or (row.is_copy is not None and objective.name != "ntp")
    if has_gaps:
        key = jax.random.fold_in(keys["mask"], step)
        if objective.ratio_per_row:  # From a stream apart from that of the positions.
            fraction *= jax.random.uniform(jax.random.fold_in(key, 2**31), (len(inputs.tokens), 1))
        if row.is_copy is None:
            gaps = _gaps(inputs, row.maskable, objective, key, step, fraction)
        else:
            gaps, is_target = _gaps_of_copies(row, objective, key, fraction)
            inputs = inputs._replace(loss_weights=jnp.where(is_target, inputs.loss_weights, 0.0))
    if objective.rows_per_mean:
        inputs = inputs._replace(loss_weights=_per_mean(inputs.loss_weights, objective.rows_per_mean))
    if not has_gaps:
        return inputs
    noise_key = jax.random.fold_in(keys["noise"], step)
    fill = OBJECTIVES[objective.name] if filler is None else _fill_by(filler)
    return fill(inputs._replace(is_masked=gaps), fraction, noise_key, objective)


def _fill_by(filler: Int[Array, ""]) -> Corruption:
    """What does as the objective in this place of FILLERS."""

    def fill(clean: Inputs, ratio: Ratio, key: jax.Array, objective: Objective) -> Inputs:
        def way(name: str) -> Callable[[Inputs, jax.Array], Inputs]:
            return lambda clean, key: OBJECTIVES[name](clean, ratio, key, objective)

        return jax.lax.switch(filler, [way(name) for name in FILLERS], clean, key)

    return fill


def _gaps(
    clean: Inputs,
    maskable: Bool[AnyArray, "B L"] | None,
    objective: Objective,
    key: Key[Array, ""],
    step: Int[Array, ""],
    ratio: Ratio,
) -> Bool[Array, "B T"]:
    """Draws the gaps of ordinary rows."""
    eligible = None if clean.segment_ids is None else clean.segment_ids != 0  # None: a mask may fall everywhere.
    if maskable is not None:
        may = jnp.asarray(maskable[:, :-1])
        eligible = may if eligible is None else may & eligible
    if objective.name == "fcm":
        is_first = clean.visibility.positions == 0
        eligible = ~is_first if eligible is None else eligible & ~is_first
    if objective.strategy == "official":
        table = jnp.asarray(official_masks(clean.tokens.shape[1], objective.mask_ratio))
        gaps = jnp.broadcast_to(table[step % OFFICIAL_CYCLE], clean.tokens.shape)
        return gaps if eligible is None else gaps & eligible
    _, gaps = mask_tokens(
        key,
        clean.tokens,
        ratio,
        mask_id=objective.mask_id,
        eligible=eligible,
        segment_ids=clean.segment_ids,
        strategy=objective.strategy,
        span_length=objective.span_length,
    )
    return gaps


def _gaps_of_copies(
    row: Row, objective: Objective, key: Key[Array, ""], ratio: Ratio
) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """Draws the gaps in copies of answers, as many in each answer as the official code does (MEAP-SFT/MEAP-SFT.py).

    Returns:
      The inputs that are gaps, and the targets that count: in copies those that are gaps, elsewhere all.
    """
    maskable, is_copy = jnp.asarray(row.maskable), jnp.asarray(row.is_copy)
    gaps = maskable
    if not objective.has_static_masks:
        # A group is an answer: its last token, which ends it, is never maskable, so that two of them never touch.
        answers = jnp.cumsum(maskable & ~jnp.roll(maskable, 1, axis=1).at[:, 0].set(False), axis=1)
        _, gaps = mask_tokens(
            key,
            jnp.asarray(row.tokens),
            ratio,
            eligible=maskable,
            segment_ids=answers,
            protect_last=False,
            strategy=objective.strategy,
            span_length=objective.span_length,
        )
    return gaps[:, :-1], (gaps | ~is_copy)[:, 1:]


def _per_mean(weights: Float32[Array, "B T"], rows: int) -> Float32[Array, "B T"]:
    """Weights that come to 1 in each group of `rows` rows, so that their sum is the number of means."""
    groups = weights.reshape(-1, rows * weights.shape[1])
    total = groups.sum(axis=1, keepdims=True)
    return (groups / jnp.where(total > 0, total, 1)).reshape(weights.shape)
