"""The paper's two statistics, score decay and variance increase, on all of the 2 x 2 of model and input (Table 10).

The paper compares an NTP model on clean inputs with a MEAP model on masked ones, so that model and input differ at
once. Here each of the four cells is measured on the same sequences with the same gaps, and the paper's contrast is
shown beside those in which one of the two stays.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from meap_jax.analysis.attention import FIRST_TOKEN
from meap_jax.results import Interval
from meap_jax.statistics import TTest, holm, mean_interval, ratio_interval, t_test

MODELS, INPUTS = ("ntp", "meap"), ("clean", "masked")
CELLS = tuple(f"{model}_{given}" for model in MODELS for given in INPUTS)

# Statistics that contrasts are shown of, by what the paper calls them; each in every reading that its text allows. The
# first of each is the one that plots show.
DECAY = ("masked_per_key", "masked_pooled")
VARIANCE = ("variance_between_keys", "variance_pooled", "variance_within_query")


class Contrast(NamedTuple):
    """A sum of cells with these signs, and the cell that it is a share of."""

    name: str
    label: str
    signs: Mapping[str, int]
    base: str

    def of(self, cells: Mapping[str, np.ndarray]) -> np.ndarray:
        """The sum of arrays of one shape, one a cell."""
        return np.sum([sign * np.asarray(cells[cell], float) for cell, sign in self.signs.items()], axis=0)


def _from_to(name: str, label: str, base: str, other: str) -> Contrast:
    return Contrast(name, label, {base: -1, other: 1}, base)


CONTRASTS = (
    _from_to("paper", "NTP on clean -> MEAP on masked (the paper's)", "ntp_clean", "meap_masked"),
    _from_to("input_ntp", "NTP: clean -> masked", "ntp_clean", "ntp_masked"),
    _from_to("input_meap", "MEAP: clean -> masked", "meap_clean", "meap_masked"),
    _from_to("model_clean", "clean: NTP -> MEAP", "ntp_clean", "meap_clean"),
    _from_to("model_masked", "masked: NTP -> MEAP", "ntp_masked", "meap_masked"),
    Contrast(
        "interaction",
        "interaction: what masking does to MEAP more than to NTP",
        {"meap_masked": 1, "meap_clean": -1, "ntp_masked": -1, "ntp_clean": 1},
        "ntp_clean",
    ),
)


class Effect(NamedTuple):
    """A contrast over sequences."""

    difference: Interval  # Mean of the contrast: the paper's printed formula of the variance increase.
    relative: Interval  # The mean contrast over the mean of its base.
    test: TTest  # Of whether the mean contrast is 0; pairs are sequences.


def effect(contrast: Contrast, cells: Mapping[str, Float[np.ndarray, " S"]]) -> Effect:
    """What a contrast comes to.

    The score decay of the paper (section 5) is the negative of `relative` for the attention of masked keys: (Att(X_N) -
    Att(X_M)) / Att(X_N). Both means are taken before the quotient, so that no sequence with a small base decides it.

    Args:
      contrast: one of `CONTRASTS`.
      cells: {name in `CELLS`: [S]}, S at least 2, of the same sequences in the same order.
    """
    differences = contrast.of(cells)
    relative = ratio_interval(differences, cells[contrast.base])
    return Effect(mean_interval(differences), relative, t_test(differences))


def rows(cells: Mapping[str, Float[np.ndarray, "S 2"]]) -> list[dict[str, Any]]:
    """All contrasts of one statistic, each with and without the first token: what one table shows.

    Args:
      cells: {name in `CELLS`: [S, 2]}, the last axis being `FIRST_TOKEN`.

    Returns:
      A record each, of JSON's types. `p_holm` is corrected for the number of rows.
    """
    found = []
    for case, first_token in enumerate(FIRST_TOKEN):
        for contrast in CONTRASTS:
            of_contrast = effect(contrast, {cell: values[:, case] for cell, values in cells.items()})
            found.append(
                {
                    "contrast": contrast.name,
                    "first_token": first_token,
                    "base_mean": float(cells[contrast.base][:, case].mean()),
                    "difference": of_contrast.difference._asdict(),
                    "relative": of_contrast.relative._asdict(),
                    **of_contrast.test._asdict(),
                }
            )
    return with_holm(found)


def with_holm(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with `p_holm`: their p values corrected for how many there are."""
    corrected = holm([record["p"] for record in records])
    return [record | {"p_holm": p} for record, p in zip(records, corrected, strict=True)]


def summarize(cells: Mapping[str, Mapping[str, Float[np.ndarray, "S L H 2"]]], layers: list[int]) -> dict[str, Any]:
    """The whole analysis of masked keys.

    Args:
      cells: {name in `CELLS`: {name in `attention.QUANTITIES`: [S, L, H, 2]}}.
      layers: those that means go over.

    Returns:
      Of JSON's types: `cells` (the mean over sequences with its interval of each quantity), `contrasts` ({statistic:
      `rows`}, of means over layers and heads), `layers` (the same of each layer, p values corrected over all layers of
      a statistic), `heads` ({statistic: {first_token: {contrast: [L][H] relative change}}}), `sequences` (each quantity
      of each sequence, averaged over layers and heads).
    """
    statistics = (*DECAY, *VARIANCE)
    overall = {
        cell: {name: values[:, layers].mean(axis=(1, 2), dtype=float) for name, values in quantities.items()}
        for cell, quantities in cells.items()
    }
    by_layer: dict[str, list[dict[str, Any]]] = {}
    by_head: dict[str, Any] = {}
    for name in statistics:
        heads_mean = {cell: quantities[name].mean(axis=2, dtype=float) for cell, quantities in cells.items()}
        num_layers = heads_mean[CELLS[0]].shape[1]
        of_layers = [
            {"layer": layer} | row
            for layer in range(num_layers)
            for row in rows({cell: values[:, layer] for cell, values in heads_mean.items()})
        ]
        by_layer[name] = with_holm(of_layers)
        over_sequences = {cell: quantities[name].mean(axis=0, dtype=float) for cell, quantities in cells.items()}
        relative = {c.name: c.of(over_sequences) / over_sequences[c.base] for c in CONTRASTS}
        by_head[name] = {
            first_token: {contrast: values[..., case].tolist() for contrast, values in relative.items()}
            for case, first_token in enumerate(FIRST_TOKEN)
        }
    return {
        "cells": {
            cell: {
                name: {first: mean_interval(values[:, case])._asdict() for case, first in enumerate(FIRST_TOKEN)}
                for name, values in quantities.items()
            }
            for cell, quantities in overall.items()
        },
        "contrasts": {name: rows({cell: overall[cell][name] for cell in CELLS}) for name in statistics},
        "layers": by_layer,
        "heads": by_head,
        "sequences": {
            cell: {
                name: {first: values[:, case].tolist() for case, first in enumerate(FIRST_TOKEN)}
                for name, values in quantities.items()
            }
            for cell, quantities in overall.items()
        },
    }
