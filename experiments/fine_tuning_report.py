"""The page of `experiments.fine_tuning`: report.md and results.json."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from meap_jax.evals import compare
from meap_jax.results import Interval
from meap_jax.statistics import mean_interval


class Run(NamedTuple):
    """What one fine-tuned run left behind."""

    arm: str
    seed: int
    num_steps: int
    tokens: int  # That it read, without padding.
    records: list[dict[str, float]]  # Of metrics.jsonl.
    evaluation: dict[str, Any]  # Metrics and examples, as from `meap_jax.evaluate`.

    @property
    def seconds(self) -> float:
        """Of its steps alone."""
        steps = np.diff([0, *(record["step"] for record in self.records)])
        return float(steps @ [record["step_seconds"] for record in self.records])


def write(
    folder: epath.Path, runs: Sequence[Run], baseline: str, before: dict[int, float], setting: dict[str, Any]
) -> str:
    """Writes results.json and report.md; returns the page.

    Args:
      folder: where they go.
      runs: of every arm, one for each seed.
      baseline: the arm that the others are compared with.
      before: accuracy of the pre-trained model by the number of documents.
      setting: sizes, config, versions and seeds, for the record.
    """
    arms = summarize(runs, baseline, list(before))
    (folder / "results.json").write_text(json.dumps({"arms": arms, "before": before, "setting": setting}, indent=1))
    page = markdown(arms, baseline, before, setting)
    (folder / "report.md").write_text(page)
    return page


def summarize(runs: Sequence[Run], baseline: str, documents: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Of each arm: accuracy, its difference to the baseline, loss, and what training took.

    With several seeds a pair of runs is the unit of a difference, with one seed a question that both models answered.
    """
    of = {arm: [run for run in runs if run.arm == arm] for arm in dict.fromkeys(run.arm for run in runs)}
    names = {f"accuracy_{n}": f"mdqa/file_{n}/best_subspan_em" for n in documents} | {"loss": "test_text/loss"}
    first = [run.evaluation for run in of[baseline]]
    found = {}
    for arm, own in of.items():
        evaluations = [run.evaluation for run in own]
        rows = compare.compare_runs(first, evaluations) if len(own) > 1 else compare.compare(first[0], evaluations[0])
        compared = {row.name: row for table in rows.values() for row in table}
        scores = {}
        for name, metric in names.items():
            values = [evaluation["metrics"][metric]["estimate"] for evaluation in evaluations]
            scores[name] = {"seeds": values, "mean": mean_interval(values)._asdict()}
            if arm != baseline:
                scores[name]["difference"] = compared[metric].difference._asdict()
        took = {"steps": own[0].num_steps, "tokens": own[0].tokens, "seconds": [run.seconds for run in own]}
        found[arm] = {**scores, **took}
    return found


def markdown(arms: dict[str, dict[str, Any]], baseline: str, before: dict[int, float], setting: dict[str, Any]) -> str:
    """The page: one table, with what it was made from."""
    num_seeds, sizes = len(setting["seeds"]), setting["sizes"]
    unit = (
        f"Means over {num_seeds} seeds with 95 % t intervals; a pair of runs of one seed is the unit of a difference."
        if num_seeds > 1
        else "One seed: a question is the unit of a difference, which is about these two models alone (95 % bootstrap)."
    )
    trained = ", ".join(f"{share:.1%} with {n} documents" for n, share in before.items())
    columns = ["arm"]
    for n in before:
        columns += [f"accuracy, {n} documents, %", f"minus {baseline}"]
    columns += ["test loss", f"minus {baseline}", "steps", "tokens", "seconds of training"]
    lines = [
        "# Fine-tuning by NTP and by MEAP",
        "",
        f"All arms begin from one model, pre-trained by NTP for {sizes['pretrain_steps']:,} steps, which answers right "
        f"{trained}.",
        f"Fine-tuned on {sizes['samples']:,} samples with contexts of up to {sizes['documents'][0]} documents; "
        f"{sizes['questions']:,} questions for each number of documents. {unit}",
        "",
        f"| {' | '.join(columns)} |",
        f"| {' | '.join(['---'] * len(columns))} |",
    ]
    for arm, own in arms.items():
        cells = [arm]
        for name, scale, digits in [*((f"accuracy_{n}", 100, 1) for n in before), ("loss", 1, 4)]:
            difference = own[name].get("difference")
            cells += [_shown(own[name]["mean"], scale, digits), _shown(difference, scale, digits, sign="+")]
        cells += [f"{own['steps']:,}", f"{own['tokens']:,}", f"{np.mean(own['seconds']):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    return "\n".join([*lines, "", f"Tokens are without padding. {versions}.", ""])


def _shown(interval: dict[str, Any] | None, scale: float, digits: int, sign: str = "") -> str:
    """An interval as "71.5 [60.2, 82.8]", without ends where it has none; "" for None."""
    if interval is None:
        return ""
    estimate, low, high = (None if v is None else f"{v * scale:{sign}.{digits}f}" for v in Interval(**interval))
    return f"{estimate}" if low is None else f"{estimate} [{low}, {high}]"
