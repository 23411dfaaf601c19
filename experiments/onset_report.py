"""Makes tables and pictures of what `experiments.onset` measured.

python -m experiments.onset_report --workdir=runs/onset

Prints the tables as Markdown and writes pictures beside the parts' JSON files. Every arm is compared with the NTP runs
of the same seeds in the same setting.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.onset import PARTS
from experiments.outcomes import Outcomes, begun, by_arm, difference, p_value, spread, times_as_many
from meap_jax import cli
from meap_jax.errors import ConfigError
from meap_jax.statistics import paired_t_interval

NTP = "ntp"
MAIN = ("ntp", "meap15_ramped", "random_ramped", "zero_ramped")  # In the picture of documents.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


class Arm(NamedTuple):
    """An arm of the study."""

    part: str
    setting: str
    of: Outcomes


def read(folder: Path) -> dict[tuple[str, str], Arm]:
    """The arms of all parts that are there, by setting and name.

    Raises:
      ConfigError: there is none.
    """
    arms: dict[tuple[str, str], Arm] = {}
    for part in PARTS:
        file = folder / f"{part}.json"
        runs = json.loads(file.read_text())["members"] if file.exists() else []
        for setting in dict.fromkeys(run["setting"] for run in runs):
            own = by_arm(run for run in runs if run["setting"] == setting)
            arms |= {(setting, name): Arm(part, setting, of) for name, of in own.items()}
    if not arms:
        raise ConfigError(f"--workdir is {folder}, which holds no part of the study: run experiments.onset first.")
    return arms


# -------------------------------------------------------------------------------------------------------------- tables


def table(arms: Sequence[Outcomes], baseline: Outcomes) -> list[str]:
    """Onset and accuracies of arms in one setting, beside NTP."""
    lines = [
        "| arm | onset, 1,000 tokens | times NTP's | p | accuracy on documents as trained on, % | on longer ones, % | "
        "minus NTP, on longer ones | clean loss minus NTP's |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in arms:
        seeds = sorted(arm.runs.keys() & baseline.runs.keys())
        own, theirs = arm.onsets(seeds), baseline.onsets(seeds)
        cells = [arm.label, begun(own)]
        is_same = own == theirs  # A ramp that begins later changes nothing.
        cells += ["", ""] if is_same else [times_as_many(theirs, own), p_value(theirs, own)]
        cells += [spread(arm.settled(documents, seeds)) for documents in ("trained", "longer")]
        if arm.name == NTP:
            cells += ["", ""]
        else:
            longer = arm.settled("longer", seeds) - baseline.settled("longer", seeds)
            loss = arm.metric("retrieval/loss", seeds) - baseline.metric("retrieval/loss", seeds)
            cells += [difference(longer), difference(loss, 3)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def documents_table(arms: Sequence[Outcomes], baseline: Outcomes) -> list[str]:
    """Accuracy at the end by the number of facts, and by the sentences between facts and questions."""
    columns = _document_columns(baseline)
    lines = ["| arm | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for arm in arms:
        seeds = sorted(arm.runs.keys() & baseline.runs.keys())
        cells = []
        for wanted in columns.values():
            values = arm.in_cells(seeds, **wanted)
            cells.append(f"{values.mean():.1f}")
            differences = values - baseline.in_cells(seeds, **wanted)
            if differences.any():
                cells[-1] += f" ({difference(differences)})"
        lines.append(f"| {arm.label} | " + " | ".join(cells) + " |")
    return lines


def _document_columns(arm: Outcomes) -> dict[str, dict[str, tuple[int, ...]]]:
    """Which cells make a column: each number of facts with fillers as trained on, then the most facts by fillers."""
    cells = next(iter(arm.runs.values()))["cells"]
    facts, fillers = (sorted({cell[key] for cell in cells}) for key in ("num_facts", "num_fillers"))
    trained = tuple(n for n in fillers if n <= 1)
    columns: dict[str, dict[str, tuple[int, ...]]] = {
        f"{n} facts": {"num_facts": (n,), "num_fillers": trained} for n in facts
    }
    beyond = [n for n in fillers if n > 1]
    return columns | {f"{n} sentences between": {"num_facts": tuple(facts), "num_fillers": (n,)} for n in beyond}


# ------------------------------------------------------------------------------------------------------------- pictures


def plot_ratios(file: Path, arms: dict[tuple[str, str], Arm]) -> None:
    """Onset by ratio from the start, and accuracy on longer documents by ratio after a ramp."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm in _own(arms):
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
    right.set(xlabel="masked, %", ylabel="accuracy on 16 facts, %", ylim=(0, 100))
    for color, label in ((COLORS[0], "NTP"), (COLORS[1], "ramped up"), ("0.6", "from the start")):
        right.plot([], [], "o", color=color, label=label)
    right.legend(frameon=False)
    _save(figure, file, left, right)


def _ratio(name: str) -> float | None:
    """The mask ratio in % that the name of an arm of MEAP says; 0 for NTP."""
    if name == NTP:
        return 0.0
    number = name.removeprefix("meap").removesuffix("_ramped")
    return float(number) if number.replace(".", "").isdecimal() and name.startswith("meap") else None


def _own(arms: dict[tuple[str, str], Arm]) -> list[Outcomes]:
    """The arms of the setting that changes nothing."""
    return [arm.of for (setting, _), arm in arms.items() if not setting]


def plot_differences(file: Path, arms: dict[tuple[str, str], Arm]) -> None:
    """Accuracy on longer documents minus NTP's, of all arms that ramp up, with intervals over seeds."""
    baseline = arms["", NTP].of
    shown = [arm for arm in _own(arms) if arm.name.endswith("_ramped") or arm.name == "decay"]
    figure = Figure(figsize=(8, 0.4 * len(shown) + 1.2), layout="constrained")
    axes = figure.subplots()
    for y, arm in enumerate(reversed(shown)):
        seeds = sorted(arm.runs.keys() & baseline.runs.keys())
        differences = arm.settled("longer", seeds) - baseline.settled("longer", seeds)
        of = paired_t_interval(differences)
        axes.plot(np.array(of[1:], float), [y, y], color=COLORS[1])
        axes.plot(differences, [y] * len(seeds), "o", color=COLORS[1], alpha=0.4, markersize=4)
        axes.plot([of.estimate], [y], "|", color=COLORS[1], markersize=14)
    axes.axvline(0, color="0.4", linewidth=1)
    axes.set_yticks(range(len(shown)), [arm.label for arm in reversed(shown)])
    axes.set_xlabel("accuracy on 16 facts minus NTP's, points (a dot a seed; 95 % intervals over seeds)")
    _save(figure, file, axes)


def plot_documents(file: Path, arms: dict[tuple[str, str], Arm]) -> None:
    """Accuracy by the number of facts, and by how many sentences are between."""
    shown = [arms["", name].of for name in MAIN if ("", name) in arms]
    columns = _document_columns(shown[0])
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, word, label in zip(
        panels, ("facts", "sentences"), ("facts of a document", "sentences between facts and questions"), strict=True
    ):
        at = {name: wanted for name, wanted in columns.items() if name.split()[1] == word}
        x = [int(name.split()[0]) for name in at]
        for color, arm in zip(COLORS, shown, strict=False):
            values = np.array([arm.in_cells(sorted(arm.runs), **wanted) for wanted in at.values()])
            panel.plot(x, values, "o", color=color, alpha=0.35, markersize=3)
            panel.plot(x, values.mean(axis=1), color=color, label=arm.label)
        panel.set_xlabel(label)
    panels[0].axvspan(2, 7, color="0.93", zorder=0)
    panels[0].set_ylabel("answers right at the end, %")
    panels[0].legend(frameon=False)
    _save(figure, file, *panels)


def _save(figure: Figure, file: Path, *panels: Axes) -> None:
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def command(argv: list[str]) -> None:
    """Prints the tables of a study and writes its pictures."""
    parser = argparse.ArgumentParser(prog="experiments.onset_report", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", default="runs/onset", type=Path, help="that of experiments.onset")
    folder = parser.parse_args(argv[1:]).workdir
    arms = read(folder)
    groups: dict[tuple[str, str], list[Outcomes]] = defaultdict(list)
    for part, setting, of in arms.values():
        groups[part, setting].append(of)
    for (part, setting), group in groups.items():
        title = PARTS[part].question + (f" {setting[0].upper()}{setting[1:]}." if setting else "")
        print("\n".join(["", f"**{title}**", "", *table(group, arms[setting, NTP].of)]))
    own = _own(arms)
    if own:
        all_begun = [arm for arm in own if not any(o.is_censored for o in arm.onsets(arm.runs))]
        print("\n".join(["", "**Documents**, arms of which every run began", ""]))
        print("\n".join(documents_table(all_begun, arms["", NTP].of)))
        plot_ratios(folder / "onset_ratio.png", arms)
        plot_differences(folder / "onset_difference.png", arms)
        plot_documents(folder / "onset_documents.png", arms)
    print(f"pictures: {folder}/onset_*.png", file=sys.stderr)


if __name__ == "__main__":
    cli.run_command(command)
