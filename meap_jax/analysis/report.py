"""Writes the results of the analysis: JSON, Markdown and figures, in a folder that is there whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from meap_jax.analysis import plots
from meap_jax.analysis.attention import FIRST_TOKEN, QUANTITIES
from meap_jax.analysis.contrasts import CELLS, CONTRASTS, DECAY, VARIANCE
from meap_jax.analysis.segments import SEGMENTS, VIEWS
from meap_jax.errors import ConfigError, DataError

LABELS = {contrast.name: contrast.label for contrast in CONTRASTS}

# Table 10: score decay and variance increase in %, each with its t, by sequence length.
PAPER = {
    1_024: {"decay": 34.08, "decay_t": -25.71, "variance": 12.66, "variance_t": 12.26},
    4_096: {"decay": 53.34, "decay_t": -9.97, "variance": 7.80, "variance_t": 5.22},
}


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that gets its name if nothing goes wrong, and goes away otherwise.

    Raises:
      ConfigError: `out` exists.
      DataError: it can't be written.
    """
    if out.exists():
        raise ConfigError(f"--out is {out}, which exists: name a folder that doesn't, or delete it.")
    partial = out.parent / f".{out.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        if jax.process_index() == 0:
            partial.mkdir(parents=True)
        yield partial
        if jax.process_index() == 0:
            os.replace(partial, out)
    except OSError as error:
        raise DataError(f"--out is {out}, which can't be written: {error.strerror or error}.") from error
    finally:
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)


def write_masked(folder: Path, results: dict[str, Any]) -> None:
    """Writes masked.json, masked.md, contrasts.png, layers.png and heads.png."""
    paper = PAPER.get(results["setting"]["seq_len"])
    plots.plot_contrasts(folder / "contrasts.png", results, paper)
    plots.plot_layers(folder / "layers.png", results)
    plots.plot_heads(folder / "heads.png", results)
    (folder / "masked.md").write_text(masked_page(results, paper), encoding="utf-8")
    _write_json(folder / "masked.json", results | {"paper": paper})


def write_shares(folder: Path, results: dict[str, Any]) -> None:
    """Writes segments.json, segments.md and segments.png."""
    plots.plot_shares(folder / "segments.png", results)
    (folder / "segments.md").write_text(shares_page(results), encoding="utf-8")
    _write_json(folder / "segments.json", results)


def _write_json(file: Path, results: dict[str, Any]) -> None:
    file.write_text(json.dumps(_finite(results), indent=1, allow_nan=False), encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON has no infinity, which a t statistic without any spread is: it is written as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


# --------------------------------------------------------------------------------------------------------- masked keys


def masked_page(results: dict[str, Any], paper: dict[str, float] | None) -> str:
    """The page about masked keys."""
    setting = results["setting"]
    lines = [
        "# Attention at masked keys",
        "",
        f"{setting['num_sequences']:,} sequences of {setting['seq_len']:,} tokens of {setting['text']}, "
        f"{setting['gaps_a_sequence']} of them masked in the masked inputs; the same sequences and gaps in all four "
        f"cells. Means over layers {', '.join(map(str, setting['layers']))} and all their heads.",
        "",
        *(f"- {name.upper()}: {_about(model)}" for name, model in setting["models"].items()),
        "",
        f"What this speaks of: {setting['choices']['scope']}.",
        "",
        "## Score decay at masked keys",
        "",
        "What masked keys get of a query's attention less than the base does, in % of the base. "
        + _cited(paper, "decay", "score decay"),
        "",
    ]
    for name in DECAY:
        lines += _contrast_table(results["contrasts"][name], QUANTITIES[name], sign=-1)
    lines += [
        "## Variance increase at unmasked keys",
        "",
        "In % of the base; the difference is the paper's printed formula. "
        + _cited(paper, "variance", "variance increase"),
        "",
    ]
    for name in VARIANCE:
        lines += _contrast_table(results["contrasts"][name], QUANTITIES[name], sign=1)
    lines += [
        "![contrasts](contrasts.png)",
        "",
        "## The four cells",
        "",
        "Means over sequences; their intervals are in masked.json.",
        "",
        "| | first token | "
        + " | ".join(cell.replace("_", " on ").replace("ntp", "NTP").replace("meap", "MEAP") for cell in CELLS)
        + " |",
        "| --- | --- |" + " --- |" * len(CELLS),
    ]
    for name, meaning in QUANTITIES.items():
        for first_token in FIRST_TOKEN:
            means = [results["cells"][cell][name][first_token]["estimate"] for cell in CELLS]
            lines.append(f"| {meaning} | {first_token} | " + " | ".join(f"{mean:.3g}" for mean in means) + " |")
    lines += ["", "## Layers and heads", "", "![layers](layers.png)", "", *_head_spread(results), ""]
    lines += ["![heads](heads.png)", "", "## What was chosen where the paper says nothing", ""]
    for key, value in setting["choices"].items():
        if isinstance(value, str):
            lines.append(f"- {key}: {value}.")
    return "\n".join([*lines, ""])


def _about(model: dict[str, Any]) -> str:
    size = f"{model['model']['num_layers']} layers of {model['model']['num_heads']} heads"
    if "imported" in model:
        return f"{model['workdir']}, imported, {size}"
    objective = model["objective"]["name"]
    return f"{model['workdir']}, step {model['step']}, objective {objective}, seed {model['seed']}, {size}"


def _cited(paper: dict[str, float] | None, key: str, what: str) -> str:
    if paper is None:
        return "(The paper has figures for 1,024 and 4,096 tokens only.)"
    return f"The paper, for its 1.1B models: {what} {paper[key]:.2f} %, t {paper[key + '_t']:.2f}, p < 1e-6."


def _contrast_table(rows: list[dict[str, Any]], meaning: str, sign: int) -> list[str]:
    lines = [
        f"{meaning[0].upper()}{meaning[1:]}:",
        "",
        "| contrast | first token | base | difference | % [95 %] | t | p | p, Holm |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ends = sorted(sign * 100 * row["relative"][end] for end in ("low", "high"))
        change = f"{sign * 100 * row['relative']['estimate']:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"
        lines.append(
            f"| {LABELS[row['contrast']]} | {row['first_token']} | {row['base_mean']:.3g} | "
            f"{row['difference']['estimate']:.3g} | {change} | {row['t']:.2f} | {_p(row['p'])} | {_p(row['p_holm'])} |"
        )
    return [*lines, ""]


def _head_spread(results: dict[str, Any]) -> list[str]:
    lines = [
        "Score decay of single heads, in %: quantiles over all layers' heads, and the share of heads with any.",
        "",
        "| contrast | first token | 5 % | median | 95 % | heads with decay |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for first_token in FIRST_TOKEN:
        for contrast in CONTRASTS:
            decay = -100 * np.array(results["heads"][DECAY[0]][first_token][contrast.name])
            low, middle, high = np.quantile(decay, (0.05, 0.5, 0.95))
            share = f"{(decay > 0).sum()} of {decay.size}"
            lines.append(f"| {contrast.label} | {first_token} | {low:.1f} | {middle:.1f} | {high:.1f} | {share} |")
    return lines


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


# ------------------------------------------------------------------------------------------------------------ segments


def shares_page(results: dict[str, Any]) -> str:
    """The page about segments."""
    models, names = list(results["shares"]), [example["name"] for example in results["examples"]]
    choices = results["setting"]["choices"]
    lines = [
        "# Attention by segment",
        "",
        "How attention is shared out among the segments of a text; the five shares sum to 1. A share is a segment's "
        f"mean attention a token, seen from {VIEWS['eos']}, averaged over layers and heads. Other views, the sum in "
        "place of the mean, and each layer are in segments.json.",
        "",
        *(f"- {Path(model['workdir']).name}: {_about(model)}" for model in results["setting"]["models"]),
        "",
        f"What this speaks of: {choices['scope']}.",
        "",
        "![shares](segments.png)",
        "",
    ]
    head = ["| | first token | " + " | ".join(SEGMENTS) + " |", "| --- | --- |" + " --- |" * len(SEGMENTS)]
    for name in names:
        lines += [f"## {name}", "", *head]
        for first_token in FIRST_TOKEN:
            for model in models:
                shares = results["shares"][model][name]["mean"][first_token]["eos"]["all"]
                lines.append(f"| {Path(model).name} | {first_token} | " + " | ".join(f"{x:.3f}" for x in shares) + " |")
        if name in results["paper"]:
            paper = results["paper"][name]
            for objective in ("ntp", "meap"):
                cells = " | ".join(f"{x:.3f}" for x in paper[objective])
                lines.append(f"| the paper's {objective.upper()}, 1.1B | not stated | {cells} |")
            lines += [
                "",
                f"The paper's text is another one about the same. {paper['note'][0].upper()}{paper['note'][1:]}.",
            ]
        lines.append("")
    if results["differences"]:
        lines += _difference_table(results["differences"], len(names))
    return "\n".join(lines)


def _difference_table(records: list[dict[str, Any]], num_examples: int) -> list[str]:
    lines = [
        "## Differences",
        "",
        f"Of shares (mean a token), over {num_examples} examples; p values corrected for the rows of the table (Holm).",
        "",
        "| model less model | first token | segment | difference [95 %] | t | p | p, Holm |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        if record["score"] != "mean":
            continue
        estimate, low, high = (record["difference"][end] for end in ("estimate", "low", "high"))
        lines.append(
            f"| {Path(record['workdir']).name} less {Path(record['less']).name} | {record['first_token']} | "
            f"{record['segment']} | {estimate:+.3f} [{low:+.3f}, {high:+.3f}] | {record['t']:.2f} | "
            f"{_p(record['p'])} | {_p(record['p_holm'])} |"
        )
    return [*lines, ""]
