"""The benchmark of a training step runs torch's engines beside ours."""

import json

import pytest

import tiny_runs
from experiments.benchmarks import train_step

for _name in ("torch", "transformers"):
    pytest.importorskip(_name)


def test_quick_train_step_compares_with_torch(tmp_path, monkeypatch):
    for name in ("XLA_FLAGS", "PYTHONPATH"):  # One device for the processes that the benchmark starts.
        monkeypatch.setenv(name, tiny_runs.environment()[name])
    file = tmp_path / "result.json"
    train_step.command(["train_step", "--quick", f"--json={file}", "--repeats=1"])
    (row,) = json.loads(file.read_text())["tables"][0]["rows"]
    ratios = [row[f"ours / {name}"]["median"] for name in ("torch eager", "torch compiled", "faster torch")]
    assert all(ratio > 0 for ratio in ratios)
    assert ratios[2] == pytest.approx(min(ratios[:2]))  # One round: the faster has the smaller ratio.
