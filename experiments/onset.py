"""When does masking help? Trains arms with many seeds, and notes when each begins to look facts up, and how it ends.

python -m experiments.onset --config=configs/quickstart.py --workdir=runs/onset [--parts=ratio,filler,...] [--seeds=5]
    [--text=FILES] [--config.field=value ...]

Each part is a question, with a setting or several, each of which trains arms of its own. What a part came to is in
PART.json; an interrupted part goes on where it was, and a part that is done is not trained again. The part "language"
mixes facts with English, from the files of --text, and is left out without it.
`python -m experiments.onset_report` makes the page of them.
"""

import argparse
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
from etils import epath

from experiments import population
from experiments.arms import Arm, check_arms, check_num_seeds, config_of, seeds_of
from experiments.compare import TASKS, probes, steps_of_a_turn
from experiments.outcomes import outcome, write_whole
from meap_jax import cli
from meap_jax.errors import ConfigError
from meap_jax.evals import Setting, make_evaluators
from meap_jax.run import make_folder, open_run, versions

_log = logging.getLogger("meap_jax.experiments.onset")

ROLES = "key,fact,answer,repeat"  # Of all that a look-up needs: keys, and values wherever they are.
NTP = Arm("ntp", "NTP", {"objective.name": "ntp"})
MEAP = {"objective.name": "meap", "objective.ramp_from": None}  # From the start.


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
    "filler": Part(
        "Does [MASK] matter, or would any damage do?",
        [
            *both_ways("random", "random tokens 15 %", name="random_tokens", mask_ratio=0.15),
            *both_ways("zero", "zero embeddings 15 %", name="token_dropout", mask_ratio=0.15),
            *both_ways("fcm", "forgetful attention 15 %", name="fcm", mask_ratio=0.15),
            *both_ways("mir", "MIR 0 to 50 %", name="mir", mask_ratio=0.5, ratio_per_row=True),
            *both_ways("dropout", "dropout of hidden states 10 %", name="dropout", mask_ratio=0.1),
            Arm("decay", "NTP with ten times the weight decay", {**NTP.changes, "optimizer.weight_decay": 0.5}),
        ],
    ),
    "place": Part(
        "Which tokens are masked?",
        [
            # Which are 30 % and 70 % of all tokens: as many masks as at 5 % and 10 % of all.
            *both_ways("look_up", "15 % of keys and values", name="meap", mask_ratio=0.15, where=f"only:{ROLES}"),
            *both_ways("rest", "15 % of all other words", name="meap", mask_ratio=0.15, where=f"never:{ROLES}"),
        ],
    ),
    "training": Part(
        "Is the delay noise of the gradient, or a matter of size?",
        [NTP, Arm("meap5", "MEAP 5 % from the start", MEAP | {"objective.mask_ratio": 0.05})],
        {
            "learning rate x 2": {"optimizer.learning_rate": 4e-3},
            "batch x 2": {"global_batch_size": 16},
            "4 heads of 16": {"model.num_heads": 4, "model.num_kv_heads": 4, "model.head_dim": 16},
            "4 layers": {"model.num_layers": 4, "model.unroll": 4},
            "width 32, 1 head": {
                "model.embed_dim": 32, "model.mlp_dim": 88, "model.num_heads": 1, "model.num_kv_heads": 1,
            },
        },
    ),
    "language": Part(
        "What if looking up must be learned beside English?",
        [NTP, *both_ways("meap15", "MEAP 15 %", name="meap", mask_ratio=0.15)],
        {
            # A tokenizer of both cuts facts into more tokens, up to 384 a document.
            f"{share} of English": {
                "data.mixture": f"retrieval={1 - share:g},text={share:g}", "seq_len": 400, "global_batch_size": 5,
            }
            for share in (0.1, 0.5)
        },
    ),
}  # fmt: skip


def run_setting(
    config: ml_collections.ConfigDict,
    part: Part,
    setting: str,
    workdir: epath.Path,
    seeds: Sequence[int],
    text: str | None,
) -> list[dict[str, Any]]:
    """Trains and evaluates the arms of a part in one setting; a record for each member."""
    changes = dict(part.settings[setting])
    if "data.mixture" in changes:
        changes["data.sources.text.path"] = text
    changed = config_of(config, Arm(setting, setting, changes), config.seed)
    folder = workdir / (re.sub(r"[^a-z0-9.]+", "_", setting.lower()) or "own")
    run = open_run(changed, folder, population.evaluation_mesh(changed, jax.devices()))
    asked, evaluators = probes(run), make_evaluators(Setting.of(run, "test"), TASKS)
    members = population.train(
        run, part.arms, seeds, every=steps_of_a_turn(changed.num_steps), questions=asked, folder=folder / "states"
    )
    results = population.evaluate(run, members, evaluators)
    return [outcome(member, found, asked, setting) for member, found in zip(members, results, strict=True)]


def study(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    parts: Sequence[str],
    seeds: Sequence[int],
    text: str | None = None,
) -> None:
    """Runs parts, and writes PART.json of each that is not there; `text` is a path of English, as in data.path.

    Raises:
      ConfigError: a part is there that was made with another config or other seeds.
    """
    for name in parts:
        check_arms(config, PARTS[name].arms)
        file = workdir / f"{name}.json"
        if file.exists():
            about = json.loads(file.read_text())["about"]
            if about["seeds"] != list(seeds) or about["config"] != json.loads(json.dumps(config.to_dict())):
                raise ConfigError(f"{file} was made with another config or other seeds: name another --workdir.")
            _log.info("%s is there: it is not run again", file)
            continue
        began = time.perf_counter()
        part = PARTS[name]
        members = [
            member
            for setting in part.settings
            for member in run_setting(config, part, setting, workdir / name, seeds, text)
        ]
        about = {"question": part.question, "config": config.to_dict(), "versions": versions(), "seeds": list(seeds)}
        about["minutes"] = round((time.perf_counter() - began) / 60, 1)
        write_whole(file, {"about": about, "members": members})
        _log.info("wrote %s after %.1f minutes", file, about["minutes"])


def command(argv: list[str]) -> None:
    """Runs parts of the study as the command line says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--parts", nargs="?", const="")
    parser.add_argument("--seeds", nargs="?", const="", default="5")
    parser.add_argument("--text", nargs="?", const="")
    args, rest = parser.parse_known_args(argv[1:])
    parts = [name for name in PARTS if name != "language" or args.text]
    if args.parts is not None:
        parts = args.parts.split(",")
    if not set(parts) <= set(PARTS):
        raise ConfigError(f"--parts is {args.parts!r}, but must be some of {', '.join(PARTS)}.")
    if "language" in parts and not args.text:
        raise ConfigError("--text is not set, but the part language needs files of English, as in data.path.")
    num_seeds = check_num_seeds(args.seeds)
    config, workdir = cli.parse_config([argv[0], "--workdir=runs/onset", *rest])
    population.check_mesh(config)
    make_folder("workdir", workdir)
    population.use_all_cores()
    study(config, workdir, parts, seeds_of(config, num_seeds), args.text)


if __name__ == "__main__":
    cli.run_command(command)
