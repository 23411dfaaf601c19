"""The sweep on rented slices: what a task file says, what SkyPilot makes of it, and that its command runs."""

import functools
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

import tiny_runs
from experiments.cloud import mask_ratio
from meap_jax import cli
from meap_jax.errors import ConfigError

BUCKET = "gs://my-bucket/sweep"
FLAGS = (f"--bucket={BUCKET}", "--accelerator=tpu-v5litepod-16")
PAPER = (*FLAGS, "--config=configs/meap_100m.py", "--config.data.path=gs://my-bucket/c4")

# Prints what SkyPilot makes of each file.
READ = """
import json, os, sys, sky
for file in sys.argv[1:]:
    task = sky.Task.from_yaml(file)
    (resources,) = task.resources
    print(json.dumps({
        "name": task.name, "run": task.run, "setup": task.setup, "nodes": task.num_nodes, "envs": task.envs,
        "workdir": task.workdir, "mounts": task.file_mounts, "cloud": str(resources.cloud), "spot": resources.use_spot,
        "accelerators": resources.accelerators, "accelerator_args": resources.accelerator_args,
        "recovery": resources.job_recovery,
    }))
"""


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(tiny_runs.ROOT)


def write(folder, *flags, dry_run=True):
    """Runs the command; returns {name: text} of the files it wrote."""
    mask_ratio.command(["mask_ratio", *flags, f"--folder={folder}", *(["--dry-run"] if dry_run else [])])
    return {path.stem: path.read_text() for path in pathlib.Path(folder).rglob("*.yaml")}


def config_of(text):
    """The config and workdir that `meap_jax.main` makes of the command in a task file, as a shell splits it."""
    _, words = yaml.safe_load(text)["run"].split("python -m meap_jax.main")
    return cli.parse_config(["main", *shlex.split(words.replace("\\\n", " "))])


def test_a_file_a_ratio_and_seed_and_a_command_a_file(tmp_path, capsys):
    files = write(tmp_path, *PAPER, "--ratios=0,.15", "--seeds=2")
    assert sorted(files) == [f"ratio-{ratio}-seed-{seed}" for ratio in ("0", "0.15") for seed in (3407, 3408)]
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[:-1] for line in printed] == [["sky", "jobs", "launch", "--yes", "--detach-run"]] * 4
    assert {pathlib.Path(line[-1]).stem for line in printed} == set(files)


def test_main_accepts_every_command_as_the_run_that_its_name_says_and_nothing_else_differs(tmp_path):
    files = write(tmp_path, *PAPER, "--seeds=2", "--config.optimizer.learning_rate=1e-3")
    others = []
    for name, text in files.items():
        _, ratio, _, seed = name.split("-")
        config, workdir = config_of(text)
        assert str(workdir) == f"{BUCKET}/{name}"
        assert (config.objective.name, config.num_steps) == ("ntp" if ratio == "0" else "meap", 1_907)
        assert ratio == "0" or config.objective.mask_ratio == float(ratio)
        assert (config.seed, config.optimizer.learning_rate) == (int(seed), 1e-3)
        others.append(config.to_dict() | {"objective": None, "seed": None})
    assert others == [others[0]] * 10


def test_a_config_of_ntp_trains_meap_off_ratio_0_and_a_control_stays_itself(tmp_path):
    flags = (*FLAGS, "--config.data.path=gs://my-bucket/c4", "--ratios=0,.15", "--seeds=1")
    for words, objective in (
        (["--config=configs/ntp_100m.py"], "meap"),
        (["--config=configs/meap_100m.py", "--config.objective.name=random_tokens"], "random_tokens"),
    ):
        files = write(tmp_path / objective, *words, *flags)
        names = {name: config_of(text)[0].objective.name for name, text in files.items()}
        assert names == {"ratio-0-seed-3407": "ntp", "ratio-0.15-seed-3407": objective}


@pytest.mark.parametrize(
    "accelerator, runtime", [("tpu-v5litepod-16", "v2-alpha-tpuv5-lite"), ("tpu-v6e-8", "v2-alpha-tpuv6e")]
)
def test_spot_slices_that_recover_with_a_cache_and_prepared_data_in_the_bucket(tmp_path, accelerator, runtime):
    for flags, mounts in ((), None), (["--config.data.prepared=gs://b/data"], {"~/meap_prepared": "gs://b/data"}):
        (text, *_) = write(tmp_path, *PAPER, f"--accelerator={accelerator}", *flags).values()
        task = yaml.safe_load(text)
        resources = {"accelerators": accelerator, "accelerator_args": {"runtime_version": runtime}, "use_spot": True}
        assert resources.items() <= task["resources"].items()
        assert task["resources"]["job_recovery"]["strategy"] == "EAGER_NEXT_REGION"
        assert task["envs"]["JAX_COMPILATION_CACHE_DIR"].startswith(BUCKET)
        assert "requirements-tpu.txt" in task["setup"] and task.get("file_mounts") == mounts
        assert config_of(text)[0].data.prepared == ("~/meap_prepared" if mounts else None)  # meap_jax.main expands it.


def test_the_scripts_are_shell(tmp_path):
    awkward = "--config.data.mixture=text=0.9, retrieval=0.1"  # A space, which only quotes keep.
    (text, *_) = write(tmp_path, *PAPER, awkward).values()
    assert config_of(text)[0].data.mixture == "text=0.9, retrieval=0.1"
    for script in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=yaml.safe_load(text)[script], text=True, check=True)


def test_a_cell_runs_as_written_and_started_again_goes_on_from_its_newest_checkpoint(tmp_path):
    tiny = [f"--config.{name}={value}" for name, value in tiny_runs.TINY.items()]
    flags = (*FLAGS, "--config=configs/quickstart.py", *tiny, "--ratios=0,.15", "--seeds=1")
    text = write(tmp_path, *flags)["ratio-0.15-seed-0"]
    # A host as setup leaves it, but for the bucket, which is a folder here.
    activate = tmp_path / "meap_venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\n')
    script = yaml.safe_load(text)["run"].replace("gs://", f"{tmp_path}/")
    workdir = tmp_path / "my-bucket" / "sweep" / "ratio-0.15-seed-0"

    how = dict(env=tiny_runs.environment(HOME=str(tmp_path)), text=True, stderr=subprocess.PIPE, timeout=300)
    start = functools.partial(subprocess.run, ["bash", "-c", script], check=True, **how)

    start()
    losses = tiny_runs.losses(workdir)
    assert len(losses) == 8
    shutil.rmtree(workdir / "checkpoints" / "8")
    assert "resuming from step 6" in start().stderr
    assert tiny_runs.losses(workdir) == losses


def test_skypilot_reads_every_file_as_meant(tmp_path):
    python = tiny_runs.ROOT / ".cloud" / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-c", "import sky"], capture_output=True).returncode:
        pytest.skip("needs SkyPilot: make test-cloud installs it")
    flags = (*PAPER, "--config.data.prepared=gs://my-bucket/data")
    files = write(tmp_path, *flags) | write(tmp_path / "v6e", *flags, "--accelerator=tpu-v6e-8")
    paths = sorted(tmp_path.rglob("*.yaml"))
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    found = subprocess.check_output([python, "-c", READ, *paths], env=environment, text=True, timeout=120)
    tasks = [json.loads(line) for line in found.splitlines() if line.startswith("{")]
    assert len(tasks) == len(paths) == 2 * len(files) == 30
    for path, task in zip(paths, tasks, strict=True):
        accelerator, runtime = ("v6e-8", "v6e") if "v6e" in path.parts else ("v5litepod-16", "v5-lite")
        assert task["accelerators"] == {f"tpu-{accelerator}": 1}
        assert task["accelerator_args"] == {"runtime_version": f"v2-alpha-tpu{runtime}"}
        assert (task["cloud"], task["spot"], task["nodes"], task["workdir"]) == ("GCP", True, 1, ".")
        assert task["recovery"] == {
            "strategy": "EAGER_NEXT_REGION",
            "max_restarts_on_errors": 3,
            "recover_on_exit_codes": [142, 143],
        }
        assert task["mounts"] == {"~/meap_prepared": "gs://my-bucket/data"}
        assert task["name"].endswith(path.stem)
        assert f"--workdir={BUCKET}/{path.stem}\n" in task["run"]
        assert task["run"] in path.read_text().replace("\n  ", "\n")
        assert task["envs"] == {"JAX_COMPILATION_CACHE_DIR": f"{BUCKET}/compilation_cache"}


@pytest.fixture
def sky(tmp_path, monkeypatch):
    """Puts a command `sky` on PATH that runs a line of shell."""

    def install(script):
        (tmp_path / "sky").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "sky").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


def test_the_printed_commands_are_run_but_by_dry_run(tmp_path, sky, capsys):
    sky(f'echo sky "$@" >> {tmp_path}/submitted')
    write(tmp_path, *PAPER)
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 15 and not (tmp_path / "submitted").exists()
    write(tmp_path, *PAPER, dry_run=False)
    assert (tmp_path / "submitted").read_text() == capsys.readouterr().out == printed


def test_a_file_that_sky_refuses_stops_the_rest_and_without_sky_there_are_the_files(tmp_path, sky, monkeypatch):
    sky(f"echo x >> {tmp_path}/calls; exit 3")
    with pytest.raises(ConfigError, match=r"exit code 3 at .*ratio-0-seed-3407.yaml: 15 of 15 files"):
        write(tmp_path, *PAPER, dry_run=False)
    assert (tmp_path / "calls").read_text() == "x\n"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="requirements-cloud.txt"):
        write(tmp_path / "more", *PAPER, dry_run=False)
    assert len(list((tmp_path / "more").rglob("*.yaml"))) == 15


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bucket=/data"], "--bucket is '/data'"),
        (["--bucket"], "--bucket is ''"),
        (["--accelerator=H100:8"], "--accelerator is 'H100:8'"),
        (["--accelerator=tpu-v5litepod"], "such as tpu-v5litepod-16"),
        (["--ratios=.1,.2"], "--ratios is '.1,.2'"),
        (["--seeds=0"], "--seeds is '0'"),
        (["--workdir=runs/x"], "'--workdir=runs/x' is no flag of the sweep"),
        (["--config.seed=1"], "'--config.seed=1' is what the sweep sets"),
        (["--config.objective.mask_ratio=0.3"], "is what the sweep sets"),
        (["--config.data.path=/data/c4"], "data.path is '/data/c4'"),
        (["--config.modle.num_layers=2"], "modle"),
        (["--config.global_batch_size=0"], "global_batch_size is 0"),
        (["--config=configs/nosuch.py"], "nosuch.py"),
        (["--config"], "--config is not set"),
    ],
)
def test_bad_input_gets_one_sentence_and_no_file(tmp_path, flags, words):
    with pytest.raises(ConfigError) as error:
        write(tmp_path, *PAPER, *flags)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.yaml"))


def test_a_config_outside_the_checkout_is_not_on_the_hosts(tmp_path):
    shutil.copy("configs/meap_100m.py", tmp_path / "mine.py")
    with pytest.raises(ConfigError, match="--config is .*mine.py, but must be in"):
        write(tmp_path, *FLAGS, f"--config={tmp_path / 'mine.py'}", "--config.data.path=gs://my-bucket/c4")
