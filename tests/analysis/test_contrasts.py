"""Decay, variance change and their tests are those of hand and of scipy; no cell is mixed up with another."""

import numpy as np
import pytest
from scipy import stats

from meap_jax.analysis.attention import FIRST_TOKEN, QUANTITIES
from meap_jax.analysis.contrasts import CELLS, CONTRASTS, DECAY, VARIANCE, effect, rows, summarize, with_holm

CONTRAST = {contrast.name: contrast for contrast in CONTRASTS}
S, L, H = 12, 3, 4


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    return {
        cell: {name: rng.gamma(4.0, 1 + number, (S, L, H, 2)).astype(np.float32) for name in QUANTITIES}
        for number, cell in enumerate(CELLS)
    }


def test_decay_and_its_test_are_those_worked_out_by_hand():
    cells = dict(ntp_clean=[4.0, 2.0], ntp_masked=[9.0, 9.0], meap_clean=[9.0, 9.0], meap_masked=[2.0, 2.0])
    found = effect(CONTRAST["paper"], cells)
    # Differences are -2 and 0: mean -1, standard error 1, so t is -1, and with one degree of freedom p is 1/2.
    assert found.difference.estimate == -1
    assert found.relative.estimate == pytest.approx(-1 / 3)  # A decay of a third: the means are 3 and 2.
    assert found.test == pytest.approx((-1, 0.5))


@pytest.mark.parametrize(
    "name, before, after",
    [
        ("paper", "ntp_clean", "meap_masked"),
        ("input_ntp", "ntp_clean", "ntp_masked"),
        ("input_meap", "meap_clean", "meap_masked"),
        ("model_clean", "ntp_clean", "meap_clean"),
        ("model_masked", "ntp_masked", "meap_masked"),
    ],
)
def test_t_and_p_of_each_contrast_are_scipys_paired_test_of_its_two_cells(name, before, after):
    cells = {cell: quantities["masked_pooled"].mean(axis=(1, 2))[:, 0] for cell, quantities in drawn().items()}
    found, expected = effect(CONTRAST[name], cells), stats.ttest_rel(cells[after], cells[before])
    np.testing.assert_allclose(found.test, (expected.statistic, expected.pvalue), rtol=1e-5)
    interval = expected.confidence_interval(0.95)
    np.testing.assert_allclose(found.difference[1:], (interval.low, interval.high), rtol=1e-5)
    change = cells[after].mean() / cells[before].mean() - 1
    assert found.relative.estimate == pytest.approx(change, rel=1e-5) and found.relative.low < change


def test_the_papers_contrast_is_the_sum_of_input_model_and_interaction():
    cells = {cell: quantities["masked_pooled"][:, 0, 0, 1] for cell, quantities in drawn().items()}
    of = {name: effect(contrast, cells).relative.estimate for name, contrast in CONTRAST.items()}
    assert of["paper"] == pytest.approx(of["input_ntp"] + of["model_clean"] + of["interaction"])
    assert abs(of["interaction"]) > 0.1


def test_a_table_is_corrected_for_all_its_rows():
    cells = {cell: quantities["masked_pooled"].mean(axis=(1, 2)) for cell, quantities in drawn().items()}
    table = rows(cells)
    assert [(row["first_token"], row["contrast"]) for row in table] == [(f, c) for f in FIRST_TOKEN for c in CONTRAST]
    smallest = min(table, key=lambda row: row["p"])
    assert smallest["p_holm"] == pytest.approx(len(table) * smallest["p"])
    assert [row["p_holm"] for row in with_holm([dict(p=0.01), dict(p=0.04)])] == [0.02, 0.04]


def test_a_summary_averages_over_the_layers_that_are_asked_for_and_tells_each_one():
    cells = drawn()
    found = summarize(cells, [0, 2])
    name = DECAY[1]
    own = {cell: quantities[name][:, [0, 2]].mean(axis=(1, 2), dtype=float) for cell, quantities in cells.items()}
    assert found["contrasts"][name] == rows(own)
    assert set(found["contrasts"]) == {*DECAY, *VARIANCE}
    np.testing.assert_allclose(found["sequences"]["meap_clean"][name]["without"], own["meap_clean"][:, 1])
    interval = found["cells"]["meap_clean"][name]["without"]
    assert interval["low"] < interval["estimate"] < interval["high"]
    assert interval["estimate"] == pytest.approx(own["meap_clean"][:, 1].mean())

    layer = {cell: quantities[name][:, 1].mean(axis=1, dtype=float) for cell, quantities in cells.items()}
    of_layer = [row for row in found["layers"][name] if row["layer"] == 1]
    assert [row["t"] for row in of_layer] == [row["t"] for row in rows(layer)]
    smallest = min(found["layers"][name], key=lambda row: row["p"])
    assert smallest["p_holm"] == pytest.approx(L * 2 * len(CONTRAST) * smallest["p"])

    mean = {cell: quantities[name].mean(axis=0) for cell, quantities in cells.items()}
    by_head = found["heads"][name]["without"]["paper"]
    expected = mean["meap_masked"][..., 1] / mean["ntp_clean"][..., 1] - 1
    np.testing.assert_allclose(by_head, expected, rtol=1e-4)
