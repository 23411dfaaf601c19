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
from typing import Any, NamedTuple

from experiments import onset_plots
from experiments.onset import PARTS
from experiments.onset_plots import document_columns
from experiments.outcomes import Outcomes, begun, by_arm, difference, p_value, spread, times_as_many
from meap_jax import cli
from meap_jax.config import flatten
from meap_jax.errors import ConfigError

NTP = "ntp"
MAIN = ("ntp", "meap15_ramped", "random_ramped", "dropout_ramped")  # In the picture of documents.


class Arm(NamedTuple):
    """An arm of the study."""

    part: str
    setting: str
    of: Outcomes


class Study(NamedTuple):
    """What was run of the study."""

    arms: dict[tuple[str, str], Arm]  # By setting and name.
    config: dict[str, Any]  # That parts without settings of their own share, nested.


def read(folder: Path) -> Study:
    """Reads all parts that are there.

    Raises:
      ConfigError: there is none, the part is missing whose NTP runs others are compared with, or parts that are
        compared were made with different configs.
    """
    arms: dict[tuple[str, str], Arm] = {}
    configs: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        file = folder / f"{part}.json"
        if not file.exists():
            continue
        content = json.loads(file.read_text())
        runs = content["members"]
        if any(not run["setting"] for run in runs):
            configs[part] = content["about"]["config"]
        for setting in dict.fromkeys(run["setting"] for run in runs):
            own = by_arm(run for run in runs if run["setting"] == setting)
            arms |= {(setting, name): Arm(part, setting, of) for name, of in own.items()}
    if not arms:
        raise ConfigError(f"--workdir is {folder}, which holds no part of the study: run experiments.onset first.")
    if configs and ("", NTP) not in arms:
        raise ConfigError(f"--workdir is {folder}, which lacks the part ratio: others are compared with its NTP runs.")
    first = next(iter(configs), "")
    for part in configs:
        a, b = (_of_training(configs[name]) for name in (first, part))
        changed = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
        if changed:
            raise ConfigError(
                f"{folder} holds the parts {first} and {part} of different configs ({', '.join(changed)}): run one of "
                "them anew."
            )
    return Study(arms, configs[first] if configs else {})


def _of_training(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that decide what arms are compared on: not their objectives, nor what is logged and kept."""
    groups = ("objective.", "log.", "checkpoint.", "eval.every")
    return {name: value for name, value in flatten(config).items() if not name.startswith(groups)}


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


def documents_table(arms: Sequence[Outcomes], baseline: Outcomes, max_fillers: int) -> list[str]:
    """Accuracy at the end by the number of facts, and by sentences between, of which `max_fillers` were trained on."""
    facts, sentences = document_columns(baseline, max_fillers)
    columns = {f"{n} facts": own for n, own in facts.items()}
    columns |= {f"{n} sentences between": own for n, own in sentences.items()}
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


def command(argv: list[str]) -> None:
    """Prints the tables of a study and writes its pictures."""
    prog, form = "python -m experiments.onset_report", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--workdir", default="runs/onset", type=Path, help="that of experiments.onset")
    folder = parser.parse_args(argv[1:]).workdir
    arms, config = read(folder)
    groups: dict[tuple[str, str], list[Outcomes]] = defaultdict(list)
    for part, setting, of in arms.values():
        groups[part, setting].append(of)
    for (part, setting), group in groups.items():
        title = PARTS[part].question + (f" {setting[0].upper()}{setting[1:]}." if setting else "")
        print("\n".join(["", f"**{title}**", "", *table(group, arms[setting, NTP].of)]))
    own = {name: arm.of for (setting, name), arm in arms.items() if not setting}
    if own:
        retrieval, baseline = config["data"]["retrieval"], own[NTP]
        all_begun = [arm for arm in own.values() if not any(o.is_censored for o in arm.onsets(arm.runs))]
        print("\n".join(["", "**Documents**, arms of which every run began", ""]))
        print("\n".join(documents_table(all_begun, baseline, retrieval["max_fillers"])))
        onset_plots.ratios(folder / "onset_ratio.png", own)
        onset_plots.differences(folder / "onset_difference.png", own, baseline)
        shown = [own[name] for name in MAIN if name in own]
        onset_plots.documents(folder / "onset_documents.png", shown, retrieval)
    print(f"pictures: {folder}/onset_*.png", file=sys.stderr)


if __name__ == "__main__":
    cli.run_command(command)
