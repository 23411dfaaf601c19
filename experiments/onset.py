"""When does masking help? Trains arms with many seeds, and notes when each begins to look facts up, and how it ends.

python -m experiments.onset --config=configs/quickstart.py --workdir=runs/onset [--parts=ratio,filler,...] [--seeds=5]
    [--config.field=value ...]

Each part is a question, with a setting or several, each of which trains arms of its own. What a part came to is in
PARTS.json; an interrupted part goes on where it was, and a part that is done is not trained again.
`python -m experiments.onset_report` makes the page of them.
"""

import argparse
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
from etils import epath

from experiments import population
from experiments.arms import Arm, config_of
from experiments.compare import probes
from meap_jax import cli
from meap_jax.errors import ConfigError
from meap_jax.evals.facts import cells
from meap_jax.run import make_folder, open_run, versions

_log = logging.getLogger("meap_jax.experiments.onset")

ROLES = "key,fact,answer,repeat"  # Of all that a look-up needs: keys, and values wherever they are.
NTP = Arm("ntp", "NTP", {"objective.name": "ntp"})


def both_ways(name: str, label: str, /, **fields: Any) -> list[Arm]:
    """An objective with these fields of `objective`, from the start and ramped up from NTP."""
    changes = {f"objective.{key}": value for key, value in fields.items()}
    return [
        Arm(name, f"{label} from the start", changes | {"objective.ramp_from": None}),
        Arm(f"{name}_ramped", f"{label} ramped up", changes | {"objective.ramp_from": 0.0}),
    ]


class Part(NamedTuple):
    """A question of the study."""

    question: str
    arms: Sequence[Arm]
    settings: Mapping[str, Mapping[str, Any]] = {"": {}}  # Fields of the config that each changes, besides arms.


PARTS = {
    "ratio": Part(
        "How much is masked?",
        [
            NTP,
            *(
                arm
                for percent in (2.5, 5.0, 7.5, 10.0, 15.0)
                for arm in both_ways(f"meap{percent:g}", f"MEAP {percent:g} %", name="meap", mask_ratio=percent / 100)
            ),
        ],
    ),
}


def run_setting(
    config: ml_collections.ConfigDict, part: Part, setting: str, workdir: epath.Path, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Trains and evaluates the arms of a part in one setting; a record for each member."""
    changed = config_of(config, Arm(setting, setting, part.settings[setting]), config.seed)
    run = open_run(changed, workdir / "shared", population.evaluation_mesh(changed, jax.devices()))
    asked = probes(run)
    states = workdir / "states" / (setting or "own")
    members = population.train(run, part.arms, seeds, every=changed.eval.every, questions=asked, folder=states)
    tokens = changed.global_batch_size * changed.seq_len
    return [
        {
            "setting": setting,
            "arm": member.arm.name,
            "label": member.arm.label,
            "seed": member.seed,
            "tokens_per_step": tokens,
            "chance": {name: of_set.chance for name, of_set in asked.items()},
            "records": member.records,
            "metrics": {name: interval.estimate for name, interval in found.metrics.items()},
            "cells": cells(found.examples["facts"]),
        }
        for member, found in zip(members, population.evaluate(run, members, "test", "validation,facts"), strict=True)
    ]


def study(config: ml_collections.ConfigDict, workdir: epath.Path, parts: Sequence[str], seeds: Sequence[int]) -> None:
    """Runs parts, and writes PART.json of each that is not there."""
    for name in parts:
        file = workdir / f"{name}.json"
        if file.exists():
            _log.info("%s is there: it is not run again", file)
            continue
        began = time.perf_counter()
        part = PARTS[name]
        members = [
            member for setting in part.settings for member in run_setting(config, part, setting, workdir / name, seeds)
        ]
        about = {"question": part.question, "config": config.to_dict(), "versions": versions(), "seeds": list(seeds)}
        about["minutes"] = round((time.perf_counter() - began) / 60, 1)
        file.write_text(json.dumps({"about": about, "members": members}))
        _log.info("wrote %s after %.1f minutes", file, about["minutes"])


def command(argv: list[str]) -> None:
    """Runs parts of the study as the command line says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--parts", nargs="?", const="", default=",".join(PARTS))
    parser.add_argument("--seeds", nargs="?", const="", default="5")
    args, rest = parser.parse_known_args(argv[1:])
    parts = args.parts.split(",")
    if not set(parts) <= set(PARTS):
        raise ConfigError(f"--parts is {args.parts!r}, but must be some of {', '.join(PARTS)}.")
    if not args.seeds.isdecimal() or int(args.seeds) < 2:
        raise ConfigError(f"--seeds is {args.seeds!r}, but must be a number from 2 on: one seed has no spread.")
    config, workdir = cli.parse_config([argv[0], "--workdir=runs/onset", *rest])
    population.check_mesh(config)
    make_folder("workdir", workdir)
    population.use_all_cores()
    study(config, workdir, parts, [config.seed + i for i in range(int(args.seeds))])


if __name__ == "__main__":
    cli.run_command(command)
