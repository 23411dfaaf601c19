"""The sweep: the command, its table, and what it refuses."""

import json

import numpy as np
import pytest

import tiny_runs
from experiments import mask_ratio
from meap_jax.errors import ConfigError


def test_the_command_prints_a_table_and_writes_json_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = tiny_runs.flags("runs/sweep", num_steps=2)
    mask_ratio.command(["mask_ratio", "--ratios=0,.15", "--seeds=2", *flags])

    table = capsys.readouterr().out
    assert "| 0.15 | " in table and " ± " in table and "[" in table
    results = json.loads((tmp_path / "runs/sweep/mask_ratio.json").read_text())
    assert set(results["metrics"]) == {"validation_retrieval/loss", "validation_retrieval_answers/accuracy"}
    for rows in results["metrics"].values():
        assert [row["ratio"] for row in rows] == [0, 0.15]
        assert all(len(row["values"]) == 2 and np.isfinite(row["values"]).all() for row in rows)
    assert (tmp_path / "runs/sweep/mask_ratio.png").read_bytes().startswith(b"\x89PNG")


def test_differences_are_paired_by_seed():
    rows = mask_ratio.summarize(np.array([1.0, 2.0, 3.0, 1.1, 2.2, 3.3]), (0, 0.5))
    assert [row["mean"] for row in rows] == pytest.approx([2.0, 2.2])
    assert rows[1]["sd"] == pytest.approx(1.1)
    # t(0.975, 2 degrees of freedom) = 4.30265; the differences 0.1, 0.2, 0.3 have sd 0.1.
    half = 4.30265 * 0.1 / np.sqrt(3)
    expected = {"estimate": 0.2, "low": 0.2 - half, "high": 0.2 + half}
    assert rows[1]["difference"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "flag",
    [
        "--ratios=.1,.2", "--ratios=0,1.5", "--ratios=0,nan", "--ratios=0,0", "--ratios=x", "--ratios",
        "--seeds=1", "--seeds=0", "--seeds=-1", "--seeds=two",
    ],
)  # fmt: skip
def test_bad_ratios_and_seeds_are_named(flag):
    with pytest.raises(ConfigError, match=f"{flag.partition('=')[0]} is"):
        mask_ratio.command(["mask_ratio", flag])


@pytest.mark.parametrize("axis", ["data", "tensor"])
def test_a_mesh_that_would_split_a_model_is_named(axis, tmp_path):
    flags = tiny_runs.flags(tmp_path, **{"mesh__data": 1, f"mesh__{axis}": 2})
    with pytest.raises(ConfigError, match=rf"mesh\.{axis} is 2, but must be 1 or -1: .*"):
        mask_ratio.command(["mask_ratio", *flags])
