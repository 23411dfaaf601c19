"""The page: its numbers against ones worked out by hand, its words against its numbers."""

import json

import numpy as np
import pytest
from etils import epath

from experiments import report
from experiments.outcomes import begun, by_arm, difference, p_value, times_as_many
from meap_jax.config import base
from meap_jax.onset import Onset

STEPS = range(10, 101, 10)  # Of 1,000 tokens each; a ramp begins at 50.
LABELS = {"ntp": "NTP", "meap": "MEAP from the start", "meap_ramped": "MEAP ramped up", "random_ramped": "random"}


def run(arm, seed, onset_step, longer, trained=1.0):
    """A run whose accuracy jumps from 0 to `trained` after a step, or never does; it ends at `longer` on 16 facts."""
    records = [
        {
            "step": step,
            "loss": 5 / step,
            "trained/accuracy": trained * (onset_step is not None and step > onset_step),
            "longer/accuracy": longer,
        }
        for step in STEPS
    ]
    right = round(20 * longer)
    return dict(
        setting="", arm=arm, label=LABELS[arm], seed=seed, tokens_per_step=1_000, records=records,
        chance={"trained": 0.25, "longer": 1 / 16},
        metrics={"test_retrieval/loss": 1.0 + seed, "test_retrieval_answers/accuracy": longer},
        cells=[{"num_facts": n, "num_fillers": f, "correct": right, "asked": 20} for n in (2, 16) for f in (0, 1)],
        depth=[
            {"low": 0.0, "high": 0.5, "correct": right, "asked": 20},
            {"low": 0.5, "high": 1.0, "correct": 5, "asked": 20},
        ],
        distance=[{"low": 0, "high": 40, "correct": right, "asked": 20}],
    )  # fmt: skip


def made_up(meap=(None, None, None), ramped=(0.90, 0.95, 1.0), control=(0.5, 0.55, 0.6), trained=1.0):
    ntp = (20, 30, 40)
    return [
        of_arm
        for seed in range(3)
        for of_arm in (
            run("ntp", seed, ntp[seed], 0.8 + 0.05 * seed),
            run("meap", seed, meap[seed], 0.05),
            run("meap_ramped", seed, ntp[seed], ramped[seed], trained),
            run("random_ramped", seed, ntp[seed], control[seed]),
        )
    ]


def setting(seconds):
    config = base().to_dict()
    config["objective"] |= {"ramp_begin": 0.4, "ramp_end": 0.6}
    return {
        "config": config,
        "data": {"retrieval": {split: {"blocks": 12} for split in ("train", "validation", "test")}},
        "fingerprint": "abcdef0123456789",
        "versions": {"python": "3.11.9", "jax": "0.10.2"},
        "cores": 2,
        "seconds": seconds,
    }


def paragraph(**kwargs):
    return report.first_paragraph(by_arm(made_up(**kwargs)), setting(None)["config"])


def test_the_first_paragraph_says_what_came_out():
    said = paragraph()
    assert "**NTP and ramped MEAP both learned to look facts up, in each of 3 seeds**" in said
    assert (
        "NTP began after 36 thousand tokens (median); masked from the start, MEAP had not begun after 100 thousand in "
    )
    assert "MEAP had not begun after 100 thousand in 3 of 3 seeds." in said
    assert "MEAP ramped up answers 95.0 % right, more than NTP's 85.0 % (+10.0 [+10.0, +10.0] points" in said
    assert "the control, it is 55.0 %, less than NTP's (-30.0 [-30.0, -30.0])" in said


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (
            dict(trained=0.9),
            "**Not every run learned to look facts up**: of MEAP ramped up, some seed stays below 95 %",
        ),
        (dict(meap=(40, 60, 80)), "masked from the start, MEAP needed 1.8"),
        (dict(meap=(40, None, 80)), "MEAP had not begun after 100 thousand in 1 of 3 seeds"),
        (dict(ramped=(0.70, 0.75, 0.80)), "answers 75.0 % right, less than NTP's 85.0 % (-10.0 ["),
        (dict(ramped=(0.6, 0.85, 1.0)), "right, not surely other than NTP's 85.0 % (-3.3 ["),
        (dict(control=(0.85, 0.90, 0.95)), "it is 90.0 %, more than NTP's (+5.0 ["),
    ],
)
def test_the_first_paragraph_says_who_is_ahead_whoever_it_is(kwargs, words):
    assert words in paragraph(**kwargs)


def test_an_ntp_that_did_not_begin_is_said():
    runs = [run(r["arm"], r["seed"], None, 0.1) if r["arm"] == "ntp" and r["seed"] else r for r in made_up()]
    said = report.first_paragraph(by_arm(runs), setting(None)["config"])
    assert "of NTP, some seed stays below" in said and "NTP began in 1 of 3 seeds." in said


def test_the_page_and_its_files_have_all_that_a_reader_needs(tmp_path):
    results = report.write(epath.Path(tmp_path), made_up(), setting({"data": 1.5, "training": 60.0}))
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["summary"]["meap"]["is_censored"] == [True] * 3
    assert results["summary"]["meap_ramped"]["longer_minus_ntp"]["estimate"] == pytest.approx(10)
    page = (tmp_path / "report.md").read_text()
    said = (
        "# NTP and MEAP, side by side", "python 3.11.9", "abcdef012345", "- Seconds: data 1.5, training 60.",
        "| NTP | 36 (3 of 3) |  |  | 100.0 ± 0.0 | 85.0 ± 5.0 |  | 2.000 ± 1.000 |",
        "| MEAP from the start | not begun (0 of 3) | at least 2.8",
        "| MEAP ramped up | 36 (3 of 3) |  |  | 100.0 ± 0.0 | 95.0 ± 5.0 | +10.0 [+10.0, +10.0] |",
        "| naming one of the values at random | | | | 25.0 | 6.2 | | |",
        "until 40 % of the run, and mask at the whole ratio from 60 % on",
        "| 16 | 85.0 | 5.0 (-80.0 [-92.4, -67.6]) | 95.0 (+10.0 [+10.0, +10.0]) | 55.0 (-30.0 [-30.0, -30.0]) |",
        "| 0.5 to 1 | 25.0 | 25.0 | 25.0 | 25.0 |",
        "| MEAP from the start | -; 0.0, 5.0 | -; 0.0, 5.0 | -; 0.0, 5.0 |",
        "| NTP | 26; 100.0, 80.0 | 36; 100.0, 85.0 | 46; 100.0, 90.0 |",
    )  # fmt: skip
    assert [words for words in said if words not in page] == []
    for picture in ("learning.png", "accuracy.png"):
        assert f"]({picture})" in page
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "nan" not in page and "None" not in page


def test_an_interrupted_comparison_does_not_say_how_long_it_took(tmp_path):
    report.write(epath.Path(tmp_path), made_up(), setting(None))
    assert "Seconds" not in (tmp_path / "report.md").read_text()


# --------------------------------------------------------------------------------------------------------------- words


def test_onsets_in_words():
    early, late = Onset(20_000, False), Onset(100_000, True)
    assert begun([early, Onset(40_000, False)]) == "30 (2 of 2)"
    assert begun([early, early, late]) == "20 (2 of 3)"
    assert begun([early, late]) == "not begun (1 of 2)"
    assert p_value([early] * 3, [late] * 3) == "0.100" and p_value([early] * 20, [late] * 20) == "0.000"
    assert times_as_many([early, early], [Onset(40_000, False), Onset(80_000, False)]).startswith("2.83 [")
    assert times_as_many([early], [late]) == "at least 5.0"
    assert times_as_many([late], [early]) == ""


def test_differences_are_paired_with_a_t_interval():
    # t(0.975, 1 degree of freedom) = 12.7062, standard error 0.05.
    low, high = 0.35 - 12.7062 * 0.05, 0.35 + 12.7062 * 0.05
    assert difference(np.array([0.3, 0.4]), 2) == f"+0.35 [{low:+.2f}, {high:+.2f}]"
