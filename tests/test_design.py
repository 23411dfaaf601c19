"""The worked examples of docs/design.md do what the page says, in one run of the command that trains."""

import json
import re

import pytest

from meap_jax import evals, evaluate, main, objective
from meap_jax.corpus import sources
from tiny_runs import ROOT, flags, records


@pytest.fixture
def examples(monkeypatch):
    """The code on the page, run as it stands there; what it registers is gone after the test."""
    for module, registry in ((objective, "OBJECTIVES"), (sources, "SOURCES"), (evals, "EVALUATORS")):
        monkeypatch.setattr(module, registry, dict(getattr(module, registry)))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "design.md").read_text(), re.DOTALL)
    for block in blocks:
        exec(compile(block, "docs/design.md", "exec"), {"__name__": "design"})
    return blocks


def test_an_objective_a_source_and_an_evaluator_are_added_in_under_25_lines_each(examples, tmp_path, capsys):
    assert len(examples) == 3 and all(block.count("\n") < 25 for block in examples)
    words = flags(
        tmp_path, num_steps=2, objective__name="previous_token", data__mixture="text=1", data__path="counting:300",
        eval__tasks="validation,predicts_mask",
    )  # fmt: skip
    main.command(["main", *words])
    first, last = records(tmp_path)
    assert first["mask_fraction"] > 0.1
    assert last["predicts_mask/share"] < 0.2 and last["validation_text/loss"] > 0
    manifest = json.loads((tmp_path / "data" / "text" / "manifest.json").read_text())
    assert manifest["documents"] == {"train": 240, "validation": 30, "test": 30}

    evaluate.command(["evaluate", f"--workdir={tmp_path}", "--tasks=predicts_mask"])
    assert list(json.loads(capsys.readouterr().out)["metrics"]) == ["predicts_mask/share"]
