"""The figures of the analysis."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from meap_jax.analysis.attention import FIRST_TOKEN
from meap_jax.analysis.contrasts import CONTRASTS, DECAY, VARIANCE
from meap_jax.analysis.segments import SEGMENTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  After the backend is chosen.

# (statistic, sign, title): the decay is the negative change of the attention of masked keys.
SHOWN = (
    (DECAY[0], -1, "score decay at masked keys, %"),
    (VARIANCE[0], 1, "variance increase at unmasked keys, %"),
)
COLORS = ("#000000", "#1f77b4", "#d95f02", "#7570b3", "#1b9e77", "#999999")  # Of contrasts.
MARKS = {"with": "o", "without": "D"}
MODEL_COLORS = ("#1f77b4", "#d95f02", "#7570b3", "#1b9e77")
MOST_PANELS = 5


def plot_contrasts(file: Path, results: dict[str, Any], paper: dict[str, float] | None) -> Figure:
    """The two statistics in all contrasts, with and without the first token; `paper` has the paper's numbers, in %."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True)
    place = np.arange(len(CONTRASTS))
    for panel, (name, sign, title) in zip(axes, SHOWN, strict=True):
        for shift, first_token in zip((-0.12, 0.12), FIRST_TOKEN, strict=True):
            rows = [row for row in results["contrasts"][name] if row["first_token"] == first_token]
            ends = (
                sign * 100 * np.array([[row["relative"][end] for end in ("estimate", "low", "high")] for row in rows])
            )
            panel.errorbar(
                ends[:, 0], place + shift, xerr=np.abs(ends[:, 1:] - ends[:, :1]).T, fmt=MARKS[first_token], capsize=3,
                color="#333333", markerfacecolor="#333333" if first_token == "with" else "white", markersize=6,
                label=f"{first_token} the first token",
            )  # fmt: skip
        if paper is not None:
            key = "decay" if sign < 0 else "variance"
            panel.plot(paper[key], 0, "*", color="#d62728", markersize=13, label="the paper's 1.1B models", zorder=5)
        panel.axvline(0, color="#888888", linewidth=0.8)
        panel.set_xlabel(title)
        panel.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(place, [contrast.label.replace(": what", ":\nwhat") for contrast in CONTRASTS])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False, fontsize=9)
    return _save(figure, file, bottom=0.06)


def plot_layers(file: Path, results: dict[str, Any]) -> Figure:
    """The two statistics layer by layer, a row of panels each, with and without the first token side by side."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, sharey="row")
    for row_of_panels, (name, sign, title) in zip(axes, SHOWN, strict=True):
        for panel, first_token in zip(row_of_panels, FIRST_TOKEN, strict=True):
            for i, contrast in enumerate(CONTRASTS):
                rows = [
                    row
                    for row in results["layers"][name]
                    if (row["contrast"], row["first_token"]) == (contrast.name, first_token)
                ]
                x = np.array([row["layer"] for row in rows]) + 0.04 * (i - 2.5)
                y = sign * 100 * np.array([[row["relative"][e] for e in ("estimate", "low", "high")] for row in rows])
                error = np.abs(y[:, 1:] - y[:, :1]).T
                label = contrast.label.split(":")[0] if contrast.name == "interaction" else contrast.label
                panel.errorbar(x, y[:, 0], yerr=error, fmt=".-", color=COLORS[i], linewidth=1.1, label=label)
            panel.axhline(0, color="#888888", linewidth=0.8)
            panel.set_title(f"{first_token} the first token", fontsize=10)
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.3)
        row_of_panels[0].set_ylabel(title)
    for panel in axes[1]:
        panel.set_xlabel("layer")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False, fontsize=9)
    return _save(figure, file, bottom=0.08)


def plot_heads(file: Path, results: dict[str, Any]) -> Figure:
    """The score decay of each head: a matrix [layers, heads] for each contrast, with and without the first token."""
    shown = [contrast for contrast in CONTRASTS if contrast.name != "interaction"]
    heads = results["heads"][DECAY[0]]
    size = np.shape(heads["with"][shown[0].name])
    width, height = np.clip(0.3 * size[1], 2.2, 4), np.clip(0.2 * size[0], 1.4, 5)
    figure, axes = plt.subplots(
        2, len(shown), figsize=(len(shown) * width + 1.2, 2 * height + 1.3), sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for panels, first_token in zip(axes, FIRST_TOKEN, strict=True):
        for panel, contrast in zip(panels, shown, strict=True):
            decay = -100 * np.array(heads[first_token][contrast.name])
            image = panel.imshow(decay, cmap="RdBu_r", vmin=-100, vmax=100, aspect="auto")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.yaxis.get_major_locator().set_params(integer=True)
            if first_token == "with":
                panel.set_title(contrast.label.replace(" (the paper's)", "\n(the paper's)"), fontsize=8)
        panels[0].set_ylabel(f"layer\n({first_token} the first token)", fontsize=9)
    for panel in axes[1]:
        panel.set_xlabel("head")
    figure.colorbar(image, ax=axes, label="score decay, %", extend="both", shrink=0.8)
    return _save(figure, file, is_arranged=True)


def plot_shares(file: Path, results: dict[str, Any]) -> Figure:
    """Figure 6 for these models: bars of the five segments, a column an example, or their mean where there are many."""
    names = [example["name"] for example in results["examples"]]
    groups = [[name] for name in names] if len(names) <= MOST_PANELS else [names]
    figure, axes = plt.subplots(
        len(FIRST_TOKEN), len(groups), figsize=(max(3.6 * len(groups), 6), 6), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panels, first_token in zip(axes, FIRST_TOKEN, strict=True):
        for panel, group in zip(panels, groups, strict=True):
            _bars(panel, results, group, first_token)
        panels[0].set_ylabel(f"share of attention,\n{first_token} the first token")
    for panel, group in zip(axes[0], groups, strict=True):
        panel.set_title(group[0] if len(group) == 1 else f"mean of {len(group)} examples", fontsize=11)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return _save(figure, file, is_arranged=True)


def _bars(panel: Axes, results: dict[str, Any], examples: list[str], first_token: str) -> None:
    models = list(results["shares"])
    width = 0.8 / len(models)
    for i, model in enumerate(models):
        shares = [results["shares"][model][name]["mean"][first_token]["eos"]["all"] for name in examples]
        place = np.arange(len(SEGMENTS)) + (i - (len(models) - 1) / 2) * width
        bars = panel.bar(
            place, np.mean(shares, axis=0), width, color=MODEL_COLORS[i % len(MODEL_COLORS)], label=Path(model).name
        )
        panel.bar_label(bars, fmt="%.2f", fontsize=7)
    panel.set_xticks(np.arange(len(SEGMENTS)), SEGMENTS, fontsize=9)
    panel.margins(y=0.1)
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)


def _save(figure: Figure, file: Path, bottom: float = 0.0, is_arranged: bool = False) -> Figure:
    if not is_arranged:
        figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
    return figure
