"""The comparison from its command to its page, at tiny size."""

import json

import pytest

import tiny_runs
from experiments import compare
from meap_jax.errors import ConfigError


def test_pairs_share_weights_batches_and_steps_and_a_second_call_trains_nothing(one_device, tmp_path, capfd):
    # At ratio 0 MEAP is NTP: whatever else differed between the runs of a pair would show.
    words = tiny_runs.flags(tmp_path, num_steps=4, checkpoint__every=4, objective__mask_ratio=0.0)
    compare.command(["compare", "--seeds=2", *words])
    assert f"report: {tmp_path / 'report.md'}" in capfd.readouterr().out
    for seed in (0, 1):
        assert tiny_runs.losses(tmp_path / f"ntp-seed{seed}") == tiny_runs.losses(tmp_path / f"meap-seed{seed}")
    assert tiny_runs.losses(tmp_path / "ntp-seed0") != tiny_runs.losses(tmp_path / "ntp-seed1")

    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["metrics"]) == {
        "test_retrieval/loss", "test_retrieval/masked_loss", "test_retrieval_answers/accuracy"
    }  # fmt: skip
    for row in results["metrics"].values():
        assert row["ntp"] == row["meap"]
        assert row["difference"] == {"estimate": 0, "low": 0, "high": 0}
    assert (tmp_path / "report.md").read_text().startswith("# NTP and MEAP")

    saved = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*seed*/checkpoints/*/_CHECKPOINT_METADATA")}
    compare.command(["compare", "--seeds=2", *words])
    assert len(saved) == 4 and all(file.stat().st_mtime_ns == time for file, time in saved.items())
    assert json.loads((tmp_path / "results.json").read_text())["metrics"] == results["metrics"]


def test_a_run_that_fails_stops_the_comparison_with_its_own_sentence(one_device, tmp_path):
    words = tiny_runs.flags(tmp_path, optimizer__learning_rate=1e30)
    with pytest.raises(ConfigError, match=r"seed 0 failed: step \d+: the loss is .* \(log: .*log\.txt\)"):
        compare.command(["compare", "--seeds=2", *words])
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize("value", ["1", "0", "-1", "two", ""])
def test_a_comparison_needs_two_seeds(value):
    with pytest.raises(ConfigError, match="--seeds is .*, but must be a number from 2 on"):
        compare.command(["compare", f"--seeds={value}"])
