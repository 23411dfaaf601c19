"""The commands of docs/interop.md take a trained model to transformers and back, as they stand there."""

import os
import re
import shutil
import subprocess
import sys

import tiny_runs


def test_a_trained_model_goes_to_transformers_and_back_and_says_the_same(tmp_path):
    tiny_runs.run(tmp_path / "runs" / "quickstart" / "ntp-seed0", num_steps=8)
    (block,) = re.findall(r"```sh\n(.*?)```", (tiny_runs.ROOT / "docs" / "interop.md").read_text(), re.DOTALL)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    environment = tiny_runs.environment(PATH=path, HF_HUB_OFFLINE="1")
    done = subprocess.run(
        ["bash", "-euc", block], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    theirs, ours = done.stdout.split("\n", 1) if done.stdout.count("\n") == 2 else done.stdout.splitlines()
    assert theirs.strip() and theirs == ours.rstrip("\n")
    shutil.rmtree(tmp_path / "runs")
