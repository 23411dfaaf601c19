"""Every module that can be run as a command, found by its `__main__`, answers --help with its usage."""

import ast
import json
import subprocess
import sys
import time

import pytest

from tiny_runs import ROOT, environment

# Runs each command in one process, so that what they all import is imported once.
ASK_ALL = """
import contextlib, io, json, runpy, sys

answers = {}
for name in sys.argv[1:]:
    sys.argv, out, code = [name, "--help"], io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
        except BaseException as error:
            code = repr(error)
    answers[name] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(answers))
"""


def is_command(path):
    """Whether a module has the block that runs when it is a command."""
    tests = (node.test for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.If))
    return path.name == "__main__.py" or any("__main__" in ast.unparse(test) for test in tests)


COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for package in ("meap_jax", "experiments", "configs")
    for path in (ROOT / package).rglob("*.py")
    if is_command(path)
)


@pytest.fixture(scope="module")
def answers():
    command = [sys.executable, "-W", "ignore", "-c", ASK_ALL, *COMMANDS]
    pipes = dict(capture_output=True, text=True, timeout=240)
    finished = subprocess.run(command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, **pipes)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_the_commands_of_the_readme_are_among_those_that_are_found():
    assert {"meap_jax.main", "meap_jax.corpus.prepare", "meap_jax.aot", "experiments.onset"} < set(COMMANDS)
    assert "experiments.cloud.mask_ratio" in COMMANDS and "experiments.benchmarks.data" in COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_how_a_command_is_called_and_does_nothing_else(answers, name):
    code, out, err = answers[name]
    assert code == 0, (code, err)
    assert f"python -m {name}" in out or f"is now python -m {name.replace('data', 'corpus')}" in err, out
    assert "error" not in err and "Traceback" not in err


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--config=configs/quickstart.py", "--help", "--workdir=no"]])
def test_the_training_command_shows_its_help_in_a_process_of_its_own_and_soon(words, tmp_path):
    began = time.monotonic()
    command = [sys.executable, "-m", "meap_jax.main", *words]
    finished = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0 and "Traceback" not in finished.stderr
    assert "--config=configs/X.py" in finished.stdout and "  num_steps = 1000" in finished.stdout
    assert not list(tmp_path.iterdir())
    assert time.monotonic() - began < 60  # Seconds, on a busy machine; 3 on an idle one.
