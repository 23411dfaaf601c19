"""The model card of an exported model: what was trained, on what, and what was measured so far."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from meap_jax.config import flatten
from meap_jax.fields import is_path

_SETTINGS = (
    "objective.name", "objective.mask_ratio", "objective.strategy", "num_steps", "global_batch_size", "seq_len",
    "optimizer.learning_rate", "optimizer.weight_decay", "seed",
)  # fmt: skip
_OF_MASKS = ("objective.mask_ratio", "objective.strategy")  # NTP ignores them.


def text(
    workdir: epath.Path, config: ConfigDict, step: int, meta: Mapping[str, Any], num_rows: int, library: str
) -> str:
    """The Markdown of a card.

    Args:
      workdir: whose evaluations and metrics are quoted.
      config: of the run.
      step: of the checkpoint.
      meta: of the checkpoint.
      num_rows: of the vocabulary, as exported.
      library: that loads the folder: transformers or peft.
    """
    imported = meta.get("imported")
    origin = (
        f"Imported from a `{imported['family']}` model of the hub and written again; nothing was trained in between."
        if imported
        else f"Trained for {step} of {config.num_steps} steps with meap-jax."
    )
    lines = [
        "---", f"library_name: {library}", "pipeline_tag: text-generation", "tags: [meap-jax]", "---", "",
        "# A decoder of meap-jax", "",
        f"{origin} `[MASK]` is token {config.objective.mask_id}: it belongs in inputs of training with masked "
        "inputs (MEAP, https://arxiv.org/abs/2502.07490) and is never generated. The vocabulary has "
        f"{num_rows} rows.", "",
    ]  # fmt: skip
    if not imported:
        flat = flatten(config)
        lines += ["## Training", "", "| setting | value |", "| --- | --- |"]
        masks = config.objective.name != "ntp"
        lines += [f"| {name} | {flat[name]} |" for name in _SETTINGS if masks or name not in _OF_MASKS]
        lines += [
            f"| tokens | {step * config.global_batch_size * config.seq_len} |",
            f"| data.mixture | {config.data.mixture} |",
            f"| data | {str(meta.get('fingerprint'))[:12]} (fingerprint) |",
            "",
        ]
    results = _evaluations(workdir) or _last_record(workdir, step)
    if results:
        lines += [
            "## Results",
            "",
            "| metric | estimate | 95 % interval | where |",
            "| --- | --- | --- | --- |",
            *results,
            "",
        ]
    lines += ["## The whole config", "", "```json", json.dumps(_public(config), indent=2, sort_keys=True), "```", ""]
    return "\n".join(lines)


def _public(config: ConfigDict) -> dict[str, Any]:
    """The config without paths of this machine."""
    paths = ("path", "prepared", "validation", "init_from")
    flat = {name: value for name, value in flatten(config).items() if name.rpartition(".")[2] not in paths}
    return {name: value for name, value in flat.items() if name != "data.tokenizer" or not is_path(value)}


def _evaluations(workdir: epath.Path) -> list[str]:
    """Rows of a table for what `meap_jax.evaluate` wrote."""
    rows = []
    for file in sorted(workdir.glob("evaluation_*.json")):
        report = json.loads(file.read_text())
        for name, value in report.get("metrics", {}).items():
            low, high = value["low"], value["high"]
            interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
            where = f"{file.stem.removeprefix('evaluation_')}, step {report.get('step')}"
            rows.append(f"| {name} | {value['estimate']:.4f} | {interval} | {where} |")
    return rows


def _last_record(workdir: epath.Path, step: int) -> list[str]:
    """Rows of a table for the evaluations that training made last, up to this step."""
    file = workdir / "metrics.jsonl"
    if not file.exists():
        return []
    records = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    evaluated = [r for r in records if r["step"] <= step and any("/" in name for name in r)]
    if not evaluated:
        return []
    last = evaluated[-1]
    return [f"| {name} | {last[name]:.4f} | | step {last['step']} |" for name in last if "/" in name]
