"""Trains every mask ratio with every seed on spot TPU slices, each cell a managed job of SkyPilot's.

python -m experiments.cloud.mask_ratio --config=configs/meap_100m.py --bucket=gs://my-bucket/sweep
    --accelerator=tpu-v5litepod-16 [--ratios=0,.05,.1,.15,.2] [--seeds=3] [--folder=runs/cloud] [--dry-run]
    [--config.field=value ...]

Writes FOLDER/NAME-OF-THE-CONFIG/ratio-R-seed-S.yaml, a SkyPilot task a cell, prints the command that submits it, and,
without --dry-run, runs that command. SkyPilot finds a slice, copies this checkout to its hosts, starts the same command
on all of them, and when the slice is preempted does so again elsewhere. The run's workdir is in the bucket, so that it
goes on from its newest checkpoint.

Seeds count from the config's `seed` on. Ratio 0 is `objective.name=ntp`; at the other ratios a config whose objective
is `ntp` trains `meap`. `--config.data.path` must be a bucket's URL. `--config.data.prepared` may be one here: each host
gets a copy of that folder, and no cell prepares the data itself.
"""

import argparse
import pathlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
from etils import epath

from experiments.mask_ratio import parse_ratios
from meap_jax import cli
from meap_jax.errors import EXIT_HUNG, EXIT_PREEMPTED, ConfigError
from meap_jax.run import make_folder

ROOT = pathlib.Path(__file__).resolve().parents[2]  # What SkyPilot copies to the hosts.

# Software of the hosts by kind of TPU. SkyPilot's own choice for v5litepod is that of v5p.
# https://docs.cloud.google.com/tpu/docs/runtimes
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
PREPARED = "~/meap_prepared"  # Where hosts find their copy of prepared data from a bucket.

# Of a cell. `workdir` is the folder that sky is started in, and is copied but for what .gitignore names.
TASK = """\
name: {name}
workdir: .
num_nodes: 1  # A slice is one node of SkyPilot's: setup and run happen on each of its hosts.

resources:
  infra: gcp
  accelerators: {accelerator}
  accelerator_args:
    runtime_version: {runtime}
  use_spot: true
  job_recovery:  # After every preemption, lost host or hang, whose exit codes these are, and a few other failures.
    strategy: EAGER_NEXT_REGION
    max_restarts_on_errors: 3
    recover_on_exit_codes: [{codes}]

envs:
  JAX_COMPILATION_CACHE_DIR: {cache}  # The next slice need not compile again.
{mounts}
setup: |  # The hosts come with Python 3.10.
  set -e
  sudo sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled'
  curl -LsSf https://astral.sh/uv/install.sh | sh
  ~/.local/bin/uv venv --allow-existing --python 3.12 ~/meap_venv
  ~/.local/bin/uv pip install --python ~/meap_venv/bin/python -r requirements-tpu.txt 'etils[epath-gcs]'

run: |
  source ~/meap_venv/bin/activate
  python -m meap_jax.main{words}
"""
MOUNTS = """
file_mounts:
  {prepared}: {bucket}
"""


class Cell(NamedTuple):
    """One run of the sweep."""

    name: str  # Of its file, and of its workdir in the bucket.
    words: list[str]  # What follows `python -m meap_jax.main`.


class Sweep(NamedTuple):
    """What all runs share."""

    name: str
    bucket: str  # gs://...; every run has a folder in it.
    accelerator: str  # As SkyPilot names it: tpu-v5litepod-16.
    prepared: str | None  # gs://... of data that each host gets a copy of, at `PREPARED`.


def cells(config: ml_collections.ConfigDict, words: list[str], ratios: Sequence[float], num_seeds: int) -> list[Cell]:
    """The runs of a sweep, ratio by ratio, without their workdir.

    Args:
      config: what `words` make.
      words: `--config=FILE` relative to the checkout, and the user's `--config.field=value`.
      ratios: mask ratios in [0, 1].
      num_seeds: runs of each ratio, with seeds `config.seed`, `config.seed + 1`, ...
    """
    found = []
    for ratio in ratios:
        objective = [f"--config.objective.mask_ratio={ratio:g}"] if ratio else ["--config.objective.name=ntp"]
        if ratio and config.objective.name == "ntp":
            objective.append("--config.objective.name=meap")
        for seed in range(config.seed, config.seed + num_seeds):
            found.append(Cell(f"ratio-{ratio:g}-seed-{seed}", [*words, *objective, f"--config.seed={seed}"]))
    return found


def task(sweep: Sweep, cell: Cell) -> str:
    """The text of a cell's SkyPilot task file (YAML)."""
    words = [*cell.words, f"--workdir={sweep.bucket}/{cell.name}"]
    return TASK.format(
        name=f"{sweep.name}-{cell.name}".replace("_", "-"),
        accelerator=sweep.accelerator,
        codes=f"{EXIT_HUNG}, {EXIT_PREEMPTED}",
        runtime=RUNTIMES[sweep.accelerator.split("-")[1]],
        cache=f"{sweep.bucket}/compilation_cache",
        mounts=MOUNTS.format(prepared=PREPARED, bucket=sweep.prepared) if sweep.prepared else "",
        # A line a word; what YAML reads from the block is what the shell gets.
        words="".join(f" \\\n    {shlex.quote(word)}" for word in words),
    )


def submission(file: pathlib.Path) -> list[str]:
    """The command that hands a task file to SkyPilot, and comes back when the job is queued."""
    return ["sky", "jobs", "launch", "--yes", "--detach-run", str(file)]


def submit(files: Sequence[pathlib.Path]) -> None:
    """Hands the files to SkyPilot, one after the other.

    Raises:
      ConfigError: where there is no `sky`, or it refuses a file; says which are not submitted.
    """
    if shutil.which("sky") is None:
        raise ConfigError(
            "there is no command sky: pip install -r requirements-cloud.txt (an environment of its own will do, with "
            "its bin/ on PATH), or add --dry-run to write the files only."
        )
    for i, file in enumerate(files):
        code = subprocess.run(submission(file), cwd=ROOT, check=False).returncode
        if code:
            raise ConfigError(
                f"sky ended with exit code {code} at {file}: {len(files) - i} of {len(files)} files, from this one on, "
                "are not submitted; the commands above do that one by one."
            )


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags of the sweep, checked, and the settings, `--config.field=value`.

    Raises:
      ConfigError: for a bad one.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    defaults = dict(config="", bucket="", accelerator="", ratios="0,.05,.1,.15,.2", seeds="3", folder="runs/cloud")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", nargs="?", const="", default=default)
    parser.add_argument("--dry-run", action="store_true")
    args, settings = parser.parse_known_args(argv[1:])
    if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+(/[\w.-]+)*/?", args.bucket):
        raise ConfigError(f"--bucket is {args.bucket!r}, but must be a folder in a bucket: gs://my-bucket/sweep.")
    if not re.fullmatch(rf"tpu-({'|'.join(RUNTIMES)})-[1-9]\d*", args.accelerator):
        raise ConfigError(
            f"--accelerator is {args.accelerator!r}, but must be a TPU slice as SkyPilot names it, such as "
            f"tpu-v5litepod-16; kinds: {', '.join(RUNTIMES)}."
        )
    if not re.fullmatch("[1-9][0-9]*", args.seeds):
        raise ConfigError(f"--seeds is {args.seeds!r}, but must be a number from 1 on.")
    for word in settings:
        if not re.match(r"--config\.[\w.]+=", word):
            raise ConfigError(f"{word!r} is no flag of the sweep: settings are given as --config.field=value.")
        if word.partition("=")[0] in ("--config.objective.mask_ratio", "--config.seed"):
            raise ConfigError(f"{word!r} is what the sweep sets: leave it out, for --ratios and --seeds say it.")
    return args, settings


def checked_config(argv0: str, file: str, settings: list[str]) -> tuple[ml_collections.ConfigDict, str]:
    """The config, and its file relative to the checkout.

    Raises:
      ConfigError: for what can't be a run, or not one on hosts that have this checkout and buckets, and nothing else.
    """
    if not file:
        raise ConfigError("--config is not set: name a file, such as --config=configs/meap_100m.py.")
    config, _ = cli.parse_config([argv0, f"--config={file}", *settings])
    if not pathlib.Path(file).resolve().is_relative_to(ROOT):
        raise ConfigError(f"--config is {file}, but must be in {ROOT}, which is what the hosts get a copy of.")
    if config.data.path is not None and not config.data.path.startswith("gs://"):
        raise ConfigError(
            f"data.path is {config.data.path!r}, but must be in a bucket, gs://..., for hosts to read it."
        )
    return config, str(pathlib.Path(file).resolve().relative_to(ROOT))


def command(argv: list[str]) -> None:
    """Writes a task file for each run of the sweep and, without --dry-run, submits them."""
    args, settings = parse(argv)
    ratios = parse_ratios(args.ratios)
    config, file = checked_config(argv[0], args.config, settings)
    prepared = config.data.prepared if (config.data.prepared or "").startswith("gs://") else None
    if prepared is not None:
        settings = [word for word in settings if not word.startswith("--config.data.prepared=")]
        settings.append(f"--config.data.prepared={PREPARED}")

    name = pathlib.Path(file).stem
    sweep = Sweep(name, args.bucket.rstrip("/"), args.accelerator, prepared)
    folder = pathlib.Path(args.folder).expanduser().resolve() / name
    make_folder("--folder", epath.Path(folder))
    files = []
    for cell in cells(config, [f"--config={file}", *settings], ratios, int(args.seeds)):
        path = folder / f"{cell.name}.yaml"
        path.write_text(task(sweep, cell), encoding="utf-8")
        files.append(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    print("\n".join(shlex.join(submission(path)) for path in files), flush=True)
    if not args.dry_run:
        submit(files)


if __name__ == "__main__":
    cli.run_command(command)
