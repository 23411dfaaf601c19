"""The page: its numbers against ones worked out by hand, its words against its numbers."""

import json

import numpy as np
import pytest
from etils import epath

from experiments import report
from meap_jax.config import base

ASKED = [{"depth": 0.0, "distance": 10}, {"depth": 0.0, "distance": 20}, {"depth": 0.5, "distance": 30},
         {"depth": 1.0, "distance": 40}]  # fmt: skip
# Right answers of each run; the second question at depth 0 is only found by MEAP.
CORRECT = {
    ("ntp", 0): [1, 0, 1, 1],
    ("ntp", 1): [0, 0, 1, 1],
    ("meap", 0): [1, 1, 1, 1],
    ("meap", 1): [1, 0, 1, 0],
}
LOSSES = {("ntp", 0): 2.0, ("ntp", 1): 2.2, ("meap", 0): 2.3, ("meap", 1): 2.6}
NAME = "test_retrieval_answers"


def make_runs(losses=LOSSES):
    return [
        report.RunResult(
            objective,
            seed,
            [
                {"step": s, "loss": 5 / s, **({"validation_retrieval/loss": 3 / s} if s % 5 == 0 else {})}
                for s in range(1, 21)
            ],
            {
                "metrics": {
                    "test_retrieval/loss": {"estimate": losses[objective, seed], "low": 1.0, "high": 3.0},
                    f"{NAME}/accuracy": {"estimate": float(np.mean(correct)), "low": 0.1, "high": 0.9},
                    f"{NAME}/chance": {"estimate": 0.25, "low": None, "high": None},
                },
                "examples": {
                    "test_retrieval": [{"row": 0, "loss": losses[objective, seed]}],
                    NAME: [{"correct": right, **asked} for right, asked in zip(correct, ASKED, strict=True)],
                },
            },
        )
        for (objective, seed), correct in CORRECT.items()
    ]


SETTING = {
    "config": base().to_dict(),
    "data": {"retrieval": {split: {"blocks": 12} for split in ("train", "validation", "test")}},
    "fingerprint": "abcdef0123456789",
    "versions": {"python": "3.11.9", "jax": "0.10.2"},
    "cores": 2,
    "minutes": 1.5,
}


def test_differences_are_paired_by_seed_with_a_t_interval():
    row = report.summarize(make_runs())["metrics"]["test_retrieval/loss"]
    assert row["ntp"] == [2.0, 2.2] and row["meap"] == [2.3, 2.6]
    assert row["mean"] == pytest.approx({"ntp": 2.1, "meap": 2.45})
    assert row["sd"]["ntp"] == pytest.approx(0.2 / np.sqrt(2))
    # Differences 0.3 and 0.4; t(0.975, 1 degree of freedom) = 12.7062, standard error 0.05.
    expected = {"estimate": 0.35, "low": 0.35 - 12.7062 * 0.05, "high": 0.35 + 12.7062 * 0.05}
    assert row["difference"] == pytest.approx(expected, abs=1e-4)


def test_answers_are_grouped_by_depth_run_by_run_and_empty_groups_left_out():
    rows = report.summarize(make_runs())[NAME]["depth"]
    groups = [(row["low"], row["high"], row["trials_per_run"]) for row in rows]
    assert groups == [(0, 0.2, 2), (0.4, 0.6, 1), (0.8, 1, 1)]
    assert rows[0]["ntp"]["per_seed"] == [0.5, 0.0] and rows[0]["meap"]["per_seed"] == [1.0, 0.5]
    assert rows[0]["difference"] == pytest.approx({"estimate": 0.5, "low": 0.5, "high": 0.5})
    assert rows[2]["meap"]["per_seed"] == [1.0, 0.0]
    # Wilson's interval for 1 of 2, z = 1.959964: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    assert rows[0]["ntp"]["within_run"][0] == pytest.approx((0.0945312, 0.9054688), abs=1e-6)


def test_chance_is_no_result_to_compare():
    assert list(report.summarize(make_runs())["metrics"]) == ["test_retrieval/loss", f"{NAME}/accuracy"]


def test_every_answer_is_in_one_group_of_distances():
    rows = report.summarize(make_runs())[NAME]["distance"]
    assert sum(row["trials_per_run"] for row in rows) == 4
    assert all(before["high"] <= row["low"] for before, row in zip(rows, rows[1:], strict=False))


@pytest.mark.parametrize(
    ("meap_losses", "verdict"),
    [((1.0, 1.21), "MEAP is better"), ((3.0, 3.21), "NTP is better"), ((1.0, 3.4), "the interval contains 0")],
)
def test_the_page_says_who_won_whoever_it_is(tmp_path, meap_losses, verdict):
    losses = LOSSES | {("meap", seed): loss for seed, loss in enumerate(meap_losses)}
    results = report.write(epath.Path(tmp_path), make_runs(losses), SETTING)
    page = (tmp_path / "report.md").read_text()
    [line] = [line for line in page.splitlines() if line.startswith("- retrieval: loss:")]
    assert verdict in line
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))


def test_the_page_has_all_that_a_reader_needs(tmp_path):
    report.write(epath.Path(tmp_path), make_runs(), SETTING)
    page = (tmp_path / "report.md").read_text()
    said = ("2 seeds (0, 1)", "python 3.11.9", "abcdef012345", "1.5 minutes", "4 questions a run", "| 2.000, 2.300 |")
    assert [words for words in said if words not in page] == []
    for picture in ("loss.png", "depth.png"):
        assert f"]({picture})" in page
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "nan" not in page


def test_data_without_questions_has_a_page_without_a_retrieval_section(tmp_path):
    loss = {"estimate": 3.0, "low": 2.0, "high": 4.0}
    evaluation = {"metrics": {"test_stdlib/loss": loss}, "examples": {"test_stdlib": [{"row": 0, "loss": 3.0}]}}
    runs = [run._replace(evaluation=evaluation) for run in make_runs()]
    report.write(epath.Path(tmp_path), runs, SETTING)
    page = (tmp_path / "report.md").read_text()
    assert "stdlib: loss" in page and "Retrieval:" not in page and "depth.png" not in page
