"""What a batch becomes under an objective: next-token prediction (NTP), MEAP, and the controls the paper lacks.

All of them are NTP with something in the gaps of the *input*: nothing hidden (ntp), `[MASK]` (meap), a random token
(random_tokens) or a zero embedding (token_dropout). With one mask key they hide the same positions. Targets are always
the clean next tokens, and the loss covers every target that is not padding.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key

from meap_jax.config import seed_of
from meap_jax.errors import ConfigError
from meap_jax.fields import SEEDS
from meap_jax.masking import OFFICIAL_CYCLE, mask_tokens, official_masks


@dataclasses.dataclass(frozen=True)
class Objective:
    """The static half: fields as in `meap_jax.config.base`."""

    name: str
    mask_ratio: float
    strategy: str
    span_length: int
    mask_id: int
    vocab_size: int

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> "Objective":
        """From a run's config; NTP is the ratio 0."""
        fields = config.objective.to_dict()
        if fields["name"] == "ntp":
            fields["mask_ratio"] = 0.0
        return cls(vocab_size=config.model.vocab_size, **fields)


class Inputs(NamedTuple):
    """What the decoder is given and asked for; one axis more in front where micro-batches are stacked."""

    tokens: Int32[Array, "*micro B T"]  # Corrupted.
    targets: Int32[Array, "*micro B T"]  # The clean next tokens.
    loss_weights: Float32[Array, "*micro B T"]  # 0 where the target is padding.
    segment_ids: Int32[Array, "*micro B T"] | None  # 0 is padding; None: a row is one segment, without padding.
    is_masked: Bool[Array, "*micro B T"]  # The gaps.
    keep_embedding: Bool[Array, "*micro B T"] | None = None  # False where the embedding is dropped; None: all kept.


def named_keys(config: ml_collections.ConfigDict) -> dict[str, Key[Array, ""]]:
    """One key a use: init, data, mask, noise. `seed` gives all four; `seeds.mask` and so on set one alone."""
    return {name: jax.random.fold_in(jax.random.key(seed_of(config, name)), i) for i, name in enumerate(SEEDS)}


def clean_inputs(batch: dict[str, Int32[Array, "B L"]]) -> Inputs:
    """A batch of blocks under plain next-token prediction.

    Args:
      batch: `tokens` and perhaps `segment_ids`, [B, L] with L = T + 1; segment 0 is padding. Without segment ids a row
        is one segment, without padding.
    """
    tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
    counts = jnp.ones(tokens[:, 1:].shape, bool) if segment_ids is None else segment_ids[:, 1:] != 0
    return Inputs(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_weights=counts.astype(jnp.float32),
        segment_ids=None if segment_ids is None else segment_ids[:, :-1],
        is_masked=jnp.zeros_like(tokens[:, :-1], bool),
    )


def make_inputs(
    batch: dict[str, Int32[Array, "B L"]],
    objective: Objective,
    keys: dict[str, Key[Array, ""]],
    step: Int[Array, ""],
    ratio: Float[Array, ""] | None = None,
) -> Inputs:
    """The inputs of one step, from the whole global batch: call it before micro-batches are cut and outside any remat.

    Args:
      batch: `tokens` and perhaps `segment_ids`, [B, L] with L = T + 1; segment 0 is padding and never masked.
      objective: what stands in the gaps, and where they are.
      keys: "mask" draws the positions, "noise" the replacement tokens; the step is folded into both.
      step: scalar int, counted from 0.
      ratio: replaces the objective's mask ratio; may be traced, so that a sweep compiles once.

    Raises:
      ConfigError: for a ratio given to the official strategy, whose tables are made for the objective's own.
    """
    if ratio is not None and objective.strategy == "official":
        raise ConfigError(
            "objective.strategy is 'official', which masks with objective.mask_ratio only: sweep another."
        )
    clean = clean_inputs(batch)
    fraction = objective.mask_ratio if ratio is None else ratio
    if isinstance(fraction, float) and fraction == 0:
        return clean

    eligible = None if clean.segment_ids is None else clean.segment_ids != 0
    if objective.strategy == "official":
        table = jnp.asarray(official_masks(clean.tokens.shape[1], objective.mask_ratio))
        is_masked = jnp.broadcast_to(table[step % OFFICIAL_CYCLE], clean.tokens.shape)
        is_masked = is_masked if eligible is None else is_masked & eligible
        masked_tokens = jnp.where(is_masked, objective.mask_id, clean.tokens)
    else:
        masked_tokens, is_masked = mask_tokens(
            jax.random.fold_in(keys["mask"], step),
            clean.tokens,
            fraction,
            mask_id=objective.mask_id,
            eligible=eligible,
            segment_ids=clean.segment_ids,
            strategy=objective.strategy,
            span_length=objective.span_length,
        )

    if objective.name == "random_tokens":
        noise_key = jax.random.fold_in(keys["noise"], step)
        # Any row of the embedding but [MASK]: this control must not contain the treatment.
        noise = jax.random.randint(noise_key, clean.tokens.shape, 0, objective.vocab_size - 1, jnp.int32)
        noise += noise >= objective.mask_id
        return clean._replace(tokens=jnp.where(is_masked, noise, clean.tokens), is_masked=is_masked)
    if objective.name == "token_dropout":
        # Other embeddings are not scaled up, so that the controls differ in the gaps and nowhere else.
        return clean._replace(keep_embedding=~is_masked, is_masked=is_masked)
    return clean._replace(tokens=masked_tokens, is_masked=is_masked)
