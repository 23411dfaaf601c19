"""Compiled programs are kept between processes, wherever the user wants them, and never in the way of a run."""

import subprocess
import sys

import pytest

from tiny_runs import ROOT, environment

# A door whose command compiles two programs, tells how many of them it found, and what came out.
DOOR = """
import jax, jax.numpy as jnp
from meap_jax import cli

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)

def command(argv):
    x = jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
    print(len(hits), float(x.sum()), jax.config.jax_compilation_cache_dir)

cli.run_command(command)
"""


def door(**variables):
    """Hits, result, folder, and what it said."""
    env = {**environment(), **variables}
    env = {name: str(value) for name, value in env.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", DOOR], env=env, cwd=ROOT, text=True, capture_output=True, check=True)
    hits, result, folder = done.stdout.split()
    return int(hits), float(result), folder, done.stderr


@pytest.fixture
def unset():
    """What a user's environment lacks and that of the tests has."""
    return {"JAX_COMPILATION_CACHE_DIR": None, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": None}


def test_the_second_process_finds_what_the_first_compiled_in_the_users_cache_folder(tmp_path, unset):
    cold = door(**unset, XDG_CACHE_HOME=tmp_path)
    warm = door(**unset, XDG_CACHE_HOME=tmp_path)
    assert cold[0] == 0 < warm[0] and cold[1] == warm[1]
    assert warm[2] == str(tmp_path / "meap_jax" / "xla")
    home = door(**unset, XDG_CACHE_HOME=None, HOME=tmp_path)
    assert home[2] == str(tmp_path / ".cache" / "meap_jax" / "xla")


def test_the_users_own_folder_wins_and_an_empty_one_turns_it_off(tmp_path, unset):
    own = {**unset, "XDG_CACHE_HOME": tmp_path / "xdg"}
    assert door(**{**own, "JAX_COMPILATION_CACHE_DIR": tmp_path / "own"})[2] == str(tmp_path / "own")
    assert list((tmp_path / "own").iterdir())
    hits = [door(**{**own, "JAX_COMPILATION_CACHE_DIR": ""})[0] for _ in range(2)]
    assert hits == [0, 0] and not (tmp_path / "xdg").exists()


def test_a_folder_that_cannot_be_written_is_said_in_a_line_and_done_without(tmp_path, unset):
    (tmp_path / "file").write_text("in the way")
    hits, _, folder, said = door(**unset, XDG_CACHE_HOME=tmp_path / "file")
    assert (hits, folder) == (0, "None")
    [line] = said.splitlines()
    assert "compiled programs are not kept" in line and "Not a directory" in line


def test_an_entry_cut_short_by_a_kill_is_compiled_anew(tmp_path, unset):
    cold = door(**unset, XDG_CACHE_HOME=tmp_path)
    for entry in (tmp_path / "meap_jax" / "xla").glob("*-cache"):
        entry.write_bytes(entry.read_bytes()[:-100])
    again = door(**unset, XDG_CACHE_HOME=tmp_path)
    assert again[0] == 0 and again[1] == cold[1]
    assert "Error reading persistent compilation cache entry" in again[3]


def test_processes_that_start_together_share_a_fresh_folder(tmp_path, unset):
    env = {**environment(), **unset, "XDG_CACHE_HOME": str(tmp_path)}
    env = {name: value for name, value in env.items() if value is not None}
    start = lambda: subprocess.Popen([sys.executable, "-c", DOOR], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)  # noqa: E731
    together = [start() for _ in range(3)]
    results = {process.communicate(timeout=120)[0].split()[1] for process in together}
    assert all(process.returncode == 0 for process in together) and len(results) == 1
