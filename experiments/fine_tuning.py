"""Fine-tunes a small model by NTP and by MEAP in all its arrangements, and compares how they answer from a context.

python -m experiments.fine_tuning --workdir=DIR [--seeds=3] [--arms=ntp,meap_separate,...] [--pretrain_steps=1200]
    [--texts=20000] [--samples=1000] [--documents=8,16] [--questions=200]
    [--config=configs/sft_quickstart.py] [--config.field=value ...]

Writes texts and pre-trains on them by NTP, exports the model to the form of the Hugging Face hub and imports it, writes
an instruction set, fine-tunes each arm with each seed from the imported model, asks `mdqa` of each in its own chat
template, and writes report.md and results.json. The sizes of the config are those of the pre-trained model too. The
same command again goes on from what is there.
"""

import argparse
import copy
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import tqdm
from etils import epath

from experiments import fine_tuning_report, looking_up
from experiments.jobs import Job, train_all
from experiments.looking_up import Files, Sizes, write_files
from meap_jax import cli
from meap_jax import config as config_lib
from meap_jax.convert import import_model
from meap_jax.data.prepared import Prepared
from meap_jax.errors import ConfigError
from meap_jax.evals.scores import exact_match
from meap_jax.evaluate import evaluate
from meap_jax.export import export_model
from meap_jax.main import train
from meap_jax.metrics import read_metrics
from meap_jax.models import read_config
from meap_jax.run import make_folder, open_data, versions, with_steps

# What the arms differ in. NTP on MEAP's rows tells what the copies do without masks, and NTP for as many steps what
# the additional time does.
ARMS: Mapping[str, Mapping[str, str]] = {
    "ntp": {"objective.name": "ntp", "sft.arrangement": "none"},
    "meap_separate": {"objective.name": "meap", "sft.arrangement": "separate"},
    "meap_shared_prefix": {"objective.name": "meap", "sft.arrangement": "shared_prefix"},
    "meap_concat": {"objective.name": "meap", "sft.arrangement": "concat"},
    "ntp_duplicated": {"objective.name": "ntp", "sft.arrangement": "separate"},
    "ntp_equal_steps": {"objective.name": "ntp", "sft.arrangement": "none", "sft.epoch_of": "separate"},
}
BASELINE = "ntp"
# Of the pre-training, which has the sizes and batches of the fine-tunes.
PRETRAINING = {"learning_rate": 2e-3, "final_fraction": 0.1}


def pretrain(config: ml_collections.ConfigDict, workdir: epath.Path, files: Files, sizes: Sizes) -> epath.Path:
    """Pre-trains by NTP, exports to the hub's form and imports that; returns the folder of the import.

    Args:
      config: of the fine-tunes, whose sizes and batches the model has.
      workdir: of the experiment.
      files: that it wrote.
      sizes: of the run.
    """
    c = copy.deepcopy(config)
    c.update(dict(init_from=None, num_epochs=0.0, num_steps=sizes.pretrain_steps))
    c.objective.name, c.sft.arrangement = "ntp", "none"
    c.optimizer.update(PRETRAINING)
    c.data.update(dict(path=str(files.texts), tokenizer="bpe", packing="best_fit", holdout=0.02))
    c.data.sources.text.format = "text"
    c.eval.every = c.checkpoint.every = max(1, sizes.pretrain_steps // 4)
    config_lib.check(c)
    train(c, workdir / "pretrained")
    # Named by their steps: a run that was made longer is exported anew.
    exported, imported = (workdir / f"{name}_{sizes.pretrain_steps}" for name in ("exported", "imported"))
    if not exported.exists():
        export_model(workdir / "pretrained", exported, step=sizes.pretrain_steps)
    if not imported.exists():
        import_model(Path(exported), imported)
    return imported


def accuracy_before(workdir: epath.Path, files: Files) -> dict[int, float]:
    """How often the pre-trained model answers right, whose answers are sentences: by the number of documents."""
    found = {}
    for n in files.questions:
        records = ask(workdir / "pretrained", files, n, chat=False)["examples"]["mdqa"]
        found[n] = float(np.mean([exact_match(r["output"], r["golds"][0]) for r in records]))
    return found


def ask(run: epath.Path, files: Files, num_documents: int, chat: bool, tasks: str = "mdqa") -> dict[str, Any]:
    """Evaluates a run on the questions with contexts of so many documents; answers that are there are kept.

    Raises:
      ConfigError: a question has no room.
    """
    options = {"chat": str(chat), "mdqa.path": str(files.questions[num_documents]), "mdqa.prompt": str(files.prompt)}
    folder = Path(run) / f"answers_{num_documents}"
    results = evaluate(run, tasks=tasks, options={f"eval.{k}": v for k, v in options.items()}, folder=folder)
    if too_long := int(results["metrics"]["mdqa/too_long"]["estimate"]):
        raise ConfigError(f"{too_long} questions about {num_documents} documents have no room: raise eval.seq_len.")
    return results


def evaluated(run: epath.Path, files: Files) -> dict[str, Any]:
    """The evaluation of a fine-tuned run on its test split and on all questions, as one."""
    found: dict[str, Any] = {"metrics": {}, "examples": {}}
    for i, n in enumerate(files.questions):
        results = ask(run, files, n, chat=True, tasks="mdqa" if i else "validation,mdqa")
        found["metrics"] |= results["metrics"]
        for task, records in results["examples"].items():
            found["examples"].setdefault(task, []).extend(records)
    return found


def fine_tune(
    words: list[str], workdir: epath.Path, files: Files, imported: epath.Path, arms: list[str], seeds: list[int]
) -> list[fine_tuning_report.Run]:
    """Trains and evaluates each arm with each seed, from the imported model.

    Args:
      words: the command's name and its flags for the config.
      workdir: of the experiment.
      files: that it wrote.
      imported: where the model is.
      arms: keys of `ARMS`.
      seeds: of the order of blocks and of masks.
    """
    model = {f"model.{name}": value for name, value in config_lib.flatten(read_config(imported).model).items()}
    shared = {name: value for name, value in model.items() if value is not None} | {
        "init_from": imported, "data.path": files.instructions, "data.prepared": workdir / "data",
    }  # fmt: skip
    flags: dict[str, list[str]] = {}
    num_steps, tokens = dict[str, int](), dict[str, int]()
    for arm in arms:
        fields = {**shared, **ARMS[arm]}
        flags[arm] = [*words[1:], *(f"--config.{name}={value}" for name, value in fields.items())]
        config, _ = cli.parse_config([words[0], *flags[arm]])
        data = open_data(config, workdir)  # Here, before runs that share it start side by side.
        num_steps[arm] = with_steps(config, data).num_steps
        tokens[arm] = _tokens(data, num_steps[arm] * config.global_batch_size)
    jobs = {
        (arm, seed): Job(
            f"{arm} seed {seed}", workdir / f"{arm}-seed{seed}", [*flags[arm], f"--config.seed={seed}"], num_steps[arm]
        )
        for seed in seeds
        for arm in arms
    }
    train_all(list(jobs.values()))
    bar = tqdm.tqdm(jobs.items(), desc="evaluating", disable=not sys.stderr.isatty())
    return [
        fine_tuning_report.Run(
            arm, seed, job.num_steps, tokens[arm], read_metrics(job.workdir), evaluated(job.workdir, files)
        )
        for (arm, seed), job in bar
    ]


def _tokens(data: Prepared, num_rows: int) -> int:
    """The tokens in so many rows of training, without padding."""
    counts = data.plan_manifest("text")["splits"]["train"]
    return round(num_rows * counts["tokens"] / counts["blocks"])


def command(argv: list[str]) -> None:
    """Runs the experiment that the command line describes."""
    parser = argparse.ArgumentParser(prog="python -m experiments.fine_tuning", add_help=False, allow_abbrev=False)
    defaults = dict(seeds="3", arms=",".join(ARMS), documents="8,16", pretrain_steps="1200", texts="20000")
    for name, value in (defaults | dict(samples="1000", questions="200", config="configs/sft_quickstart.py")).items():
        parser.add_argument(f"--{name}", default=value)
    parser.add_argument("--workdir", default="runs/fine_tuning")
    args, rest = parser.parse_known_args(argv[1:])
    documents = tuple(_count("documents", word) for word in args.documents.split(","))
    counts = {name: _count(name, getattr(args, name)) for name in ("pretrain_steps", "texts", "samples", "questions")}
    sizes = Sizes(documents=documents, **counts)
    if min(documents) < 3 or max(documents) > looking_up.NUM_WORDS or len(set(documents)) < len(documents):
        raise ConfigError(
            f"--documents is {args.documents!r}, but must be different numbers from 3 to {looking_up.NUM_WORDS}."
        )
    arms = args.arms.split(",")
    if not set(arms) <= ARMS.keys() or arms[0] != BASELINE or len(set(arms)) < len(arms):
        raise ConfigError(
            f"--arms is {args.arms!r}, but must begin with {BASELINE} and name arms of {', '.join(ARMS)}."
        )
    words = [argv[0], f"--config={args.config}", *rest]
    config, workdir = cli.parse_config([*words, f"--workdir={args.workdir}"], needs_data=False)
    seeds = [config.seed + i for i in range(_count("seeds", args.seeds))]
    make_folder("workdir", workdir)
    # A scheduler's SIGTERM ends the runs too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    files = write_files(Path(workdir) / "files", sizes, config.data.seed)
    imported = pretrain(config, workdir, files, sizes)
    before = accuracy_before(workdir, files)
    runs = fine_tune(words, workdir, files, imported, arms, seeds)
    setting = dict(sizes=sizes._asdict(), config=config.to_dict(), versions=versions(), seeds=seeds)
    page = fine_tuning_report.write(workdir, runs, BASELINE, before, setting)
    print(f"{page}\nreport: {workdir / 'report.md'}")


def _count(name: str, text: str) -> int:
    """Reads a flag that is a number from 1 on.

    Raises:
      ConfigError: it is anything else.
    """
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"--{name} is {text!r}, but must be a number from 1 on.")
    return int(text)


if __name__ == "__main__":
    cli.run_command(command)
