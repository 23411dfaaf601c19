"""The two pictures of the report: how each run learned, and what it answers at the end."""

from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.outcomes import Outcomes

COLORS = ("#0072b2", "#000000", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # Okabe and Ito's, told apart by all.
TITLES = {"trained": "documents like those trained on", "longer": "longer documents"}


def learning(file: epath.Path, arms: dict[str, Outcomes], ramp: tuple[float, float]) -> None:
    """Draws accuracy on both sets and training loss over tokens, a line a run; a mark is an onset.

    Args:
      file: of the picture.
      arms: in the order of the legend.
      ramp: between which tokens the ratio of ramped arms goes up.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True)
    chance = next(iter(next(iter(arms.values())).runs.values()))["chance"]
    for panel, (documents, title) in zip(panels, TITLES.items(), strict=False):
        for color, arm in zip(COLORS, arms.values(), strict=False):
            for seed, onset in zip(arm.seeds, arm.onsets(arm.seeds, documents), strict=True):
                tokens, accuracies = arm.curve(seed, documents)
                panel.plot(np.divide(tokens, 1e6), 100 * np.array(accuracies), color=color, alpha=0.55, linewidth=1)
                if not onset.is_censored:
                    panel.plot(onset.tokens / 1e6, 50 * (1 + chance[documents]), "v", color=color, markersize=6)
        panel.axhline(100 * chance[documents], color="0.5", linestyle=":", linewidth=1)
        panel.set(title=f"{title}, % right", ylim=(-3, 103))
    for color, arm in zip(COLORS, arms.values(), strict=False):
        for seed in arm.seeds:
            losses = [record["loss"] for record in arm.runs[seed]["records"]]
            panels[2].plot(np.divide(arm.curve(seed, "trained")[0], 1e6), losses, color=color, alpha=0.55, linewidth=1)
    panels[2].set(title="training loss, nats a token (on masked inputs where masked)", yscale="log")
    for panel in panels:
        panel.axvspan(*np.divide(ramp, 1e6), color="0.92", zorder=0)
        _finish(panel, "million tokens")
    handles = [Line2D([], [], color=color, label=arm.label) for color, arm in zip(COLORS, arms.values(), strict=False)]
    handles += [
        Line2D([], [], color="0.3", marker="v", linestyle="", label="onset"),
        Line2D([], [], color="0.5", linestyle=":", label="one of the values at random"),
        Line2D([], [], color="0.92", linewidth=8, label="ratio ramps up"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    _save(figure, file)


def accuracy(file: epath.Path, arms: dict[str, Outcomes]) -> None:
    """Draws accuracy at the end by facts, and of the longest documents by depth and distance; a dot is a seed."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    first = next(iter(arms.values()))
    run = first.runs[first.seeds[0]]
    facts = sorted({cell["num_facts"] for cell in run["cells"]})
    for color, shift, arm in zip(COLORS, np.linspace(-0.15, 0.15, len(arms)), arms.values(), strict=False):
        by_facts = [arm.in_cells(arm.seeds, num_facts=(n,)) for n in facts]
        _dots(panels[0], np.arange(len(facts)) + shift, by_facts, color)
        for panel, by in zip(panels[1:], ("depth", "distance"), strict=True):
            _dots(panel, np.arange(len(run[by])) + shift, [_group(arm, by, g) for g in run[by]], color)
    panels[0].set_xticks(range(len(facts)), [str(n) for n in facts])
    _finish(panels[0], "facts of the document")
    panels[0].set_ylabel("answers right at the end, %")
    for panel, by, label in (
        (panels[1], "depth", f"depth of the fact, of {facts[-1]} (0 first, 1 last)"),
        (panels[2], "distance", f"tokens from fact to answer, {facts[-1]} facts"),
    ):
        panel.set_xticks(
            range(len(run[by])), [f"{g['low']:g} to {g['high']:g}" for g in run[by]], fontsize=8, rotation=20
        )
        _finish(panel, label)
    handles = [
        Line2D([], [], color=color, marker="o", markersize=4, label=arm.label)
        for color, arm in zip(COLORS, arms.values(), strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    _save(figure, file)


def _group(arm: Outcomes, by: str, group: dict[str, Any]) -> np.ndarray:
    return arm.in_group(arm.seeds, by, group["low"])


def _dots(panel: Axes, x: np.ndarray, values: list[np.ndarray], color: str) -> None:
    panel.plot(x, values, "o", color=color, alpha=0.35, markersize=3.5)
    panel.plot(x, [v.mean() for v in values], color=color, linewidth=1.4)


def _finish(panel: Axes, label: str) -> None:
    panel.set_xlabel(label)
    panel.grid(alpha=0.3)
    panel.title.set_fontsize(10)


def _save(figure: Figure, file: epath.Path) -> None:
    with file.open("wb") as out:
        figure.savefig(out, format="png", dpi=110)
