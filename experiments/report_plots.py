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
    figure = Figure(figsize=(9, 9.5), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    first = next(iter(arms.values()))
    chance = first.runs[first.seeds[0]]["chance"]
    for panel, (documents, title) in zip(panels, TITLES.items(), strict=False):
        _curves(panel, arms, f"{documents}/accuracy", 100)
        panel.axhline(100 * chance[documents], color="0.5", linestyle=":", linewidth=1)
        panel.set(title=f"{title}, % right", ylim=(-3, 103))
        for color, arm in zip(COLORS, arms.values(), strict=False):
            for seed, onset in zip(arm.seeds, arm.onsets(arm.seeds, documents), strict=True):
                if onset.is_censored:
                    height = 100 * arm.curve(seed, documents)[1][-1]
                    panel.plot(onset.tokens / 1e6, height, "o", color=color, mfc="white", clip_on=False)
                elif _parts_at(arm, first, seed) == 0:
                    panel.plot(onset.tokens / 1e6, 50 * (1 + chance[documents]), "o", color=color, mec="white")
    _curves(panels[2], arms, "loss", 1)
    losses = [r["loss"] for arm in arms.values() for run in arm.runs.values() for r in run["records"]]
    highest = np.quantile(losses, 0.95)  # The first steps would leave no room for the others.
    panels[2].set_ylim(0.95 * min(losses), highest)
    panels[2].set(title="training loss, nats a token (with masks where a run has them)")
    for panel in panels:
        panel.axvspan(*np.divide(ramp, 1e6), color="0.92", zorder=0)
        panel.set_xlim(0, None)
        _finish(panel, "")
    panels[2].set_xlabel("million tokens")
    handles = [Line2D([], [], color=color, label=arm.label) for color, arm in zip(COLORS, arms.values(), strict=False)]
    handles += [
        Line2D([], [], color="0.4", marker="o", mec="white", linestyle="", label="onset"),
        Line2D([], [], color="0.4", marker="o", mfc="white", linestyle="", label="not begun at the end"),
        Line2D([], [], color="0.5", linestyle=":", label="one of the values at random"),
        Line2D([], [], color="0.92", linewidth=8, label="the ratio ramps up"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    _save(figure, file)


def _curves(panel: Axes, arms: dict[str, Outcomes], key: str, scale: float) -> None:
    """Draws a thin line for each run, from where it parts from the first arm's, and a thick one for the mean there."""
    first = next(iter(arms.values()))
    for color, arm in zip(COLORS, arms.values(), strict=False):
        tokens = np.divide(arm.curve(arm.seeds[0], "trained")[0], 1e6)
        values = scale * np.array([[record[key] for record in arm.runs[seed]["records"]] for seed in arm.seeds])
        parts_at = [0 if arm is first else max(_parts_at(arm, first, seed) - 1, 0) for seed in arm.seeds]
        for start, of_run in zip(parts_at, values, strict=True):
            panel.plot(tokens[start:], of_run[start:], color=color, alpha=0.4, linewidth=0.9)
        start = max(parts_at)
        panel.plot(tokens[start:], values.mean(axis=0)[start:], color=color, linewidth=2)


def _parts_at(arm: Outcomes, first: Outcomes, seed: int) -> int:
    """How many records a run has in common with that of the first arm; 0 for the first arm itself."""
    if arm is first:
        return 0
    pairs = zip(arm.runs[seed]["records"], first.runs[seed]["records"], strict=True)
    return next((i for i, (own, other) in enumerate(pairs) if own != other), len(first.runs[seed]["records"]))


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
