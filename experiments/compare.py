"""Trains NTP, MEAP and a control on the same blocks from the same weights, asks all of them, and writes the report.

python -m experiments.compare --config=configs/quickstart.py --workdir=DIR [--seeds=4] [--config.field=value ...]

MEAP is trained twice: with its mask ratio from the start, and with one that ramps up as objective.ramp_* of the config
say. An interrupted comparison goes on where it was: the same command again does the rest. Every model is left as a run
in a folder of its own, from which `meap_jax.main` can go on.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from etils import epath

from experiments import population, report
from experiments.arms import Arm, check_arms, check_num_seeds, config_of, seeds_of
from experiments.members import Member
from experiments.outcomes import outcome
from meap_jax import cli
from meap_jax.checkpoint import Checkpointer, Keep
from meap_jax.data.pipeline import TrainBatches
from meap_jax.evals import Setting, make_evaluators
from meap_jax.evals.facts import FactSet, Kind, make_set
from meap_jax.metrics import METRICS_FILE, as_json
from meap_jax.models import save_tokenizer, write_config
from meap_jax.restore import newest_meta
from meap_jax.run import Run, check_resume, make_folder, open_run, versions

ARMS = (
    Arm("ntp", "NTP", {"objective.name": "ntp"}),
    Arm("meap", "MEAP from the start", {"objective.name": "meap", "objective.ramp_from": None}),
    Arm("meap_ramped", "MEAP ramped up", {"objective.name": "meap", "objective.ramp_from": 0.0}),
    Arm("random_ramped", "random tokens ramped up", {"objective.name": "random_tokens", "objective.ramp_from": 0.0}),
)
TASKS = "validation,facts"
STATES = "states"  # Folder of what an interrupted comparison goes on from.
PROBES = 1_000_003  # Added to a seed.
DOCUMENTS = 3  # Of each kind that is asked for during training: a sixteenth of the time.


def probes(run: Run) -> dict[str, FactSet]:
    """What is asked during training: documents like those trained on, "trained", and like those held out, "longer"."""
    r, tokenizer = run.config.data.retrieval, run.prepared.tokenizer
    fillers = range(r.max_fillers + 1)
    trained = [Kind(n, f, DOCUMENTS) for n in range(r.min_facts, r.num_facts + 1) for f in fillers]
    longer = [Kind(r.num_eval_facts, f, 2 * DOCUMENTS) for f in fillers]
    sets = {"trained": trained, "longer": longer}
    seed = run.config.eval.seed + PROBES  # Other documents than those of the task `facts`.
    return {name: make_set(tokenizer, kinds, r.num_keys, r.num_values, seed) for name, kinds in sets.items()}


def steps_of_a_turn(num_steps: int) -> int:
    """How many steps are between two times that questions are asked: a divisor of all, a sixtieth of them or less."""
    return max(n for n in range(1, max(1, num_steps // 60) + 1) if num_steps % n == 0)


def check_folders(run: Run, workdir: epath.Path, seeds: Sequence[int]) -> None:
    """Stops a comparison whose runs would come into folders of other runs.

    Raises:
      ConfigError: naming the folder and the fields that differ.
    """
    for arm in ARMS:
        for seed in seeds:
            folder = workdir / f"{arm.name}-seed{seed}"
            meta = newest_meta(folder)
            if meta is not None:
                check_resume(config_of(run.config, arm, seed), meta, folder)


def write_run(run: Run, member: Member, folder: epath.Path) -> None:
    """Writes a member as a run with a checkpoint of its last step, unless that run is there, or has gone on."""
    meta = newest_meta(folder)
    if meta is not None and meta["data"]["next_index"] >= member.step:
        return
    config = ml_collections.ConfigDict(member.config.to_dict())
    config.data.prepared = str(run.prepared.folder)
    make_folder("workdir", folder)
    write_config(folder, config)
    tokenizer = save_tokenizer(folder, run.prepared.tokenizer)
    (folder / "versions.json").write_text(json.dumps(versions(), indent=2))
    (folder / METRICS_FILE).write_text("".join(as_json(record) + "\n" for record in member.records))
    checkpointer = Checkpointer(folder, Keep(config.checkpoint.keep))
    meta = {
        "config": config.to_dict(),
        "fingerprint": run.prepared.fingerprint,
        "tokenizer": tokenizer,
        "data": TrainBatches.state_at(member.step),
        "origin": {},
    }
    state = jax.tree.map(jax.numpy.asarray, member.trained)
    checkpointer.save(member.step, state, meta)
    while not checkpointer.finish():
        checkpointer.save(member.step, state, meta)
    checkpointer.close()


def compare(config: ml_collections.ConfigDict, workdir: epath.Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Trains, evaluates and writes runs and report; returns the content of results.json."""
    began = time.perf_counter()
    check_arms(config, ARMS)
    is_fresh = not (workdir / STATES).exists()
    run = open_run(config, workdir, population.evaluation_mesh(config, jax.devices()))
    check_folders(run, workdir, seeds)
    asked, evaluators = probes(run), make_evaluators(Setting.of(run, "test"), TASKS)
    prepared = time.perf_counter()
    members = population.train(
        run, ARMS, seeds, every=steps_of_a_turn(config.num_steps), questions=asked, folder=workdir / STATES
    )
    trained = time.perf_counter()
    results = population.evaluate(run, members, evaluators)
    for member in members:
        write_run(run, member, workdir / member.name)
    evaluated = time.perf_counter()
    seconds = {"data": prepared - began, "training": trained - prepared, "evaluation": evaluated - trained}
    return report.write(
        workdir,
        [outcome(member, found, asked) for member, found in zip(members, results, strict=True)],
        setting={
            "config": config.to_dict(),
            "data": {name: run.prepared.plan_manifest(name)["splits"] for name in run.prepared.sources},
            "fingerprint": run.prepared.fingerprint,
            "versions": versions(),
            "cores": os.cpu_count(),
            "seconds": {part: round(of, 1) for part, of in seconds.items()} if is_fresh else None,
        },
    )


def command(argv: list[str]) -> None:
    """Compares NTP with MEAP as the command line says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds", nargs="?", const="", default="4")
    parser.add_argument("--workdir")
    args, rest = parser.parse_known_args(argv[1:])
    num_seeds = check_num_seeds(args.seeds)
    own = [] if args.workdir is None else [f"--workdir={args.workdir}"]
    config, workdir = cli.parse_config([argv[0], *rest, *own])
    seeds = seeds_of(config, num_seeds)
    population.check_mesh(config)
    make_folder("workdir", workdir)
    population.use_all_cores()
    compare(config, workdir, seeds)
    print(f"report: {workdir / 'report.md'}")


if __name__ == "__main__":
    cli.run_command(command)
