"""The study from its command to its page, at tiny size, and its tables on made-up runs."""

import json
import re

import numpy as np
import pytest

import tiny_runs
from experiments import onset, onset_report
from experiments.arms import config_of
from meap_jax.errors import ConfigError

FIELDS = dict(num_steps=4, eval__facts__counts="2,3", eval__facts__fillers="0,2", eval__facts__documents=2)
PART = onset.Part("How?", [onset.NTP, *onset.both_ways("meap15", "MEAP 15 %", name="meap", mask_ratio=0.15)])


def test_the_command_runs_each_part_once_and_the_report_reads_it(tmp_path, monkeypatch, capsys):
    settings = {"rate x 2": {"optimizer.learning_rate": 4e-3}}
    monkeypatch.setattr(onset, "PARTS", {"ratio": PART._replace(settings=settings)})
    monkeypatch.setattr(onset_report, "PARTS", onset.PARTS)
    words = ["onset", "--seeds=2", "--parts=ratio", *tiny_runs.flags(tmp_path, **FIELDS)]
    onset.command(words)
    result = json.loads((tmp_path / "ratio.json").read_text())
    assert len(result["members"]) == 2 * 3 and result["about"]["seeds"] == [0, 1]
    for member in result["members"]:
        assert [record["step"] for record in member["records"]] == [1, 2, 3, 4]
        assert sum(cell["asked"] for cell in member["cells"]) == 2 * 2 * (2 + 3)
        assert member["chance"]["longer"] == pytest.approx(1 / 3)
    monkeypatch.setattr(onset, "run_setting", lambda *_: pytest.fail("it is done"))
    onset.command(words)
    with pytest.raises(ConfigError, match="ratio.json was made with another config or other seeds"):
        onset.command(["onset", "--seeds=3", *words[2:]])

    capsys.readouterr()
    onset_report.command(["onset_report", f"--workdir={tmp_path}"])
    shown = capsys.readouterr().out
    assert "**How? Rate x 2.**" in shown and "| MEAP 15 % ramped up | " in shown


def test_every_part_is_of_configs_that_can_run(tmp_path):
    config = tiny_runs.tiny_config()
    for name, part in onset.PARTS.items():
        for setting, changes in part.settings.items():
            fields = dict(changes) | ({"data.sources.text.path": str(tmp_path)} if name == "language" else {})
            changed = config_of(config, onset.Arm(setting, "", {"data.mixture": "retrieval=1"} | fields), 0)
            configs = [config_of(changed, arm, 0).to_dict() for arm in part.arms]
            assert len({json.dumps(c, sort_keys=True) for c in configs}) == len(part.arms)
        assert len({arm.name for arm in part.arms}) == len({arm.label for arm in part.arms}) == len(part.arms)


@pytest.mark.parametrize(
    "flag, sentence",
    [
        ("--parts=ratio,colour", "--parts is 'ratio,colour', but must be some of ratio, "),
        ("--parts", "--parts is '', but must be some of ratio, "),
        ("--parts=language", "--text is not set, but the part language needs files of English"),
        ("--seeds=1", "--seeds is '1', but must be a number from 2 on"),
    ],
)
def test_what_cannot_be_run_is_said(flag, sentence):
    with pytest.raises(ConfigError, match=sentence):
        onset.command(["onset", flag])


def test_a_report_needs_a_part(tmp_path):
    with pytest.raises(ConfigError, match="which holds no part of the study: run experiments.onset first"):
        onset_report.command(["onset_report", f"--workdir={tmp_path}"])


# ------------------------------------------------------------------------------------------------------ made-up studies


def member(arm, seed, onset_step, longer, loss=1.0):
    """A run of 100 steps of 1,000 tokens, whose accuracy jumps from 0 to 1 between two evaluations, or never does."""
    steps = range(10, 101, 10)
    trained = [float(onset_step is not None and step > onset_step) for step in steps]
    records = [
        {"step": step, "loss": 1.0, "trained/accuracy": a, "longer/accuracy": longer}
        for step, a in zip(steps, trained, strict=True)
    ]
    cells = [
        {"num_facts": n, "num_fillers": f, "correct": int(10 * longer) - f, "asked": 10}
        for n in (2, 16)
        for f in (0, 4)
    ]
    return dict(
        setting="", arm=arm, label=arm.upper(), seed=seed, tokens_per_step=1_000, records=records, cells=cells,
        chance={"trained": 0.25, "longer": 1 / 16}, metrics={"test_retrieval/loss": loss},
    )  # fmt: skip


def made_up(tmp_path):
    begun = {"ntp": (20, 30, 40), "meap5": (40, 60, 80), "meap15": (None, 60, None), "meap15_ramped": (20, 30, 40)}
    longer = {"ntp": (0.7, 0.8, 0.9), "meap5": (0.7, 0.8, 0.9), "meap15": (0, 0.1, 0), "meap15_ramped": (0.8, 0.9, 1.0)}
    members = [
        member(arm, seed, steps[seed], longer[arm][seed], 1.0 + 0.1 * (arm == "meap5"))
        for arm, steps in begun.items()
        for seed in range(3)
    ]
    config = tiny_runs.tiny_config(**{"data.retrieval.max_fillers": 1}).to_dict()
    (tmp_path / "ratio.json").write_text(json.dumps({"about": {"config": config}, "members": members}))
    return {name: arm.of for (_, name), arm in onset_report.read(tmp_path).arms.items()}


def test_the_report_prints_all_parts_and_draws_pictures(tmp_path, capsys):
    made_up(tmp_path)
    onset_report.command(["onset_report", f"--workdir={tmp_path}"])
    shown = capsys.readouterr().out
    assert "**How much is masked?**" in shown and "**Documents**" in shown and "| arm | 2 facts | 16 facts |" in shown
    for name in ("ratio", "difference", "documents"):
        assert (tmp_path / f"onset_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_takes_documents_with_no_more_between_than_in_training(tmp_path):
    made_up(tmp_path)
    content = json.loads((tmp_path / "ratio.json").read_text())
    for run in content["members"]:
        run["cells"] = [cell for cell in run["cells"] if not cell["num_fillers"]]
    (tmp_path / "ratio.json").write_text(json.dumps(content))
    onset_report.command(["onset_report", f"--workdir={tmp_path}"])
    assert (tmp_path / "onset_documents.png").exists()


def test_parts_that_are_compared_are_of_one_config_and_have_ntp(tmp_path):
    made_up(tmp_path)
    content = json.loads((tmp_path / "ratio.json").read_text())
    content["about"]["config"]["num_steps"] = 7
    (tmp_path / "place.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"holds the parts ratio and place of different configs \(num_steps\)"):
        onset_report.read(tmp_path)
    content["members"] = [run for run in content["members"] if run["arm"] != "ntp"]
    (tmp_path / "place.json").write_text(json.dumps(content))
    (tmp_path / "ratio.json").unlink()
    with pytest.raises(ConfigError, match="lacks the part ratio"):
        onset_report.read(tmp_path)


def test_tables_say_onsets_factors_and_differences(tmp_path):
    arms = made_up(tmp_path)
    rows = {row.split(" | ")[0].strip("| "): row for row in onset_report.table([*arms.values()], arms["ntp"])}
    # 0.625, half of the range above chance, is reached at 0.625 of the 10 steps behind the last 0.
    assert re.match(r"\| NTP \| 36 \(3 of 3\) \|  \|  \|", rows["NTP"])
    assert [o.tokens for o in arms["ntp"].onsets([0, 1, 2])] == [26_250, 36_250, 46_250]
    times = np.exp(np.mean(np.log([46.25 / 26.25, 66.25 / 36.25, 86.25 / 46.25])))
    assert (
        f"| 66 (3 of 3) | {times:.2f} [" in rows["MEAP5"] and "| +0.0 [+0.0, +0.0] | +0.100 [+0.100, " in rows["MEAP5"]
    )
    assert "| not begun (1 of 3) | at least " in rows["MEAP15"]
    assert "| 36 (3 of 3) |  |  | " in rows["MEAP15_RAMPED"]  # Begun before the ramp: the same run.
    assert "| 90.0 ± 10.0 | +10.0 [+10.0, +10.0] |" in rows["MEAP15_RAMPED"]


def test_documents_are_those_trained_on_by_facts_and_all_by_what_is_between(tmp_path):
    arms = made_up(tmp_path)
    header, _, ntp, *_, ramped = onset_report.documents_table([*arms.values()], arms["ntp"], 1)
    assert header == "| arm | 2 facts | 16 facts | 4 sentences between |"
    assert ntp == "| NTP | 80.0 | 80.0 | 40.0 |"
    assert ramped.startswith("| MEAP15_RAMPED | 90.0 (+10.0 [+10.0, +10.0]) | 90.0 ")
