"""The pictures of the study: onset and accuracy by ratio, differences to NTP, and accuracy by documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.outcomes import Outcomes
from meap_jax.statistics import paired_t_interval

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def ratios(file: Path, arms: dict[str, Outcomes]) -> None:
    """Draws onset by ratio from the start, and accuracy on longer documents by ratio from the start and ramped up."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm in arms.values():
        ratio, seeds = _ratio(arm.name), sorted(arm.runs)
        if ratio is None:
            continue
        if not arm.name.endswith("_ramped"):
            for i, begun in enumerate(arm.onsets(seeds)):
                x = ratio + 0.12 * (i - (len(seeds) - 1) / 2)
                marker = dict(marker="^", mfc="none") if begun.is_censored else dict(marker="o")
                left.plot([x], [begun.tokens / 1e6], color=COLORS[0], **marker)
        color = COLORS[0] if not ratio else COLORS[1] if arm.name.endswith("_ramped") else "0.6"
        values = arm.settled("longer", seeds)
        right.plot([ratio] * len(seeds), values, "o", color=color, alpha=0.5, markersize=4)
        right.plot([ratio], [values.mean()], "_", color=color, markersize=16)
    left.set(xlabel="masked from the start, %", ylabel="onset, million tokens (triangle: not begun)", ylim=(0, None))
    right.set(xlabel="masked, %", ylabel="accuracy on longer documents, %", ylim=(0, 100))
    for color, label in ((COLORS[0], "NTP"), (COLORS[1], "ramped up"), ("0.6", "from the start")):
        right.plot([], [], "o", color=color, label=label)
    right.legend(frameon=False)
    _save(figure, file, left, right)


def _ratio(name: str) -> float | None:
    """The mask ratio in % that the name of an arm of MEAP says; 0 for NTP."""
    if name == "ntp":
        return 0.0
    number = name.removeprefix("meap").removesuffix("_ramped")
    return float(number) if number.replace(".", "").isdecimal() and name.startswith("meap") else None


def differences(file: Path, arms: dict[str, Outcomes], baseline: Outcomes) -> None:
    """Draws accuracy on longer documents minus NTP's, of all arms that ramp up, with intervals over seeds."""
    shown = [arm for arm in arms.values() if arm.name.endswith("_ramped") or arm.name == "decay"]
    figure = Figure(figsize=(8, 0.4 * len(shown) + 1.2), layout="constrained")
    axes = figure.subplots()
    for y, arm in enumerate(reversed(shown)):
        seeds = sorted(arm.runs.keys() & baseline.runs.keys())
        by_seed = arm.settled("longer", seeds) - baseline.settled("longer", seeds)
        of = paired_t_interval(by_seed)
        axes.plot(np.array(of[1:], float), [y, y], color=COLORS[1])
        axes.plot(by_seed, [y] * len(seeds), "o", color=COLORS[1], alpha=0.4, markersize=4)
        axes.plot([of.estimate], [y], "|", color=COLORS[1], markersize=14)
    axes.axvline(0, color="0.4", linewidth=1)
    axes.set_yticks(range(len(shown)), [arm.label for arm in reversed(shown)])
    axes.set_xlabel("accuracy on longer documents minus NTP's, points\n(a dot a seed; 95 % intervals over seeds)")
    _save(figure, file, axes)


def document_columns(arm: Outcomes, max_fillers: int) -> tuple[dict[int, dict], dict[int, dict]]:
    """Which cells belong together: by facts, where no more is between than in training, and all by what is between.

    Returns:
      {number of facts: what `Outcomes.in_cells` is to select}, and the same by sentences between, beyond `max_fillers`.
    """
    run_cells = next(iter(arm.runs.values()))["cells"]
    facts, fillers = (sorted({cell[key] for cell in run_cells}) for key in ("num_facts", "num_fillers"))
    trained = [n for n in fillers if n <= max_fillers]
    by_facts = {n: {"num_facts": (n,), "num_fillers": trained} for n in facts}
    return by_facts, {n: {"num_facts": facts, "num_fillers": (n,)} for n in fillers if n > max_fillers}


def documents(file: Path, shown: Sequence[Outcomes], retrieval: dict[str, Any]) -> None:
    """Draws accuracy at the end by the number of facts, and by the sentences between facts and questions.

    Args:
      file: of the picture.
      shown: arms.
      retrieval: the fields data.retrieval.* of their training.
    """
    by_facts, by_sentences = document_columns(shown[0], retrieval["max_fillers"])
    drawn = {"facts of a document": by_facts, "sentences between facts and questions": by_sentences}
    drawn = {label: columns for label, columns in drawn.items() if columns}
    figure = Figure(figsize=(5 * len(drawn), 4), layout="constrained")
    panels = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for panel, (label, columns) in zip(panels, drawn.items(), strict=True):
        for color, arm in zip(COLORS, shown, strict=False):
            values = np.array([arm.in_cells(arm.seeds, **wanted) for wanted in columns.values()])
            panel.plot(list(columns), values, "o", color=color, alpha=0.35, markersize=3)
            panel.plot(list(columns), values.mean(axis=1), color=color, label=arm.label)
        panel.set_xlabel(label)
        panel.set_xticks(list(columns))
    panels[0].axvspan(retrieval["min_facts"], retrieval["num_facts"], color="0.93", zorder=0)
    panels[0].set_ylabel("answers right at the end, %")
    panels[0].legend(frameon=False)
    _save(figure, file, *panels)


def _save(figure: Figure, file: Path, *panels: Axes) -> None:
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
