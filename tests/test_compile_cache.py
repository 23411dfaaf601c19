"""Compiled programs are kept between processes, wherever the user wants them, and never in the way of a run."""

import subprocess
import sys

from tiny_runs import ROOT, environment

# A command that compiles two programs, and prints how many of them it found and their result.
PROGRAM = """
import jax, jax.numpy as jnp
from meap_jax import cli

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)

def command(argv):
    x = jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
    print(len(hits), float(x.sum()), jax.config.jax_compilation_cache_dir)

cli.run_command(command)
"""


def start(**variables):
    """The command, in the environment of a user, who has not set what these tests set for themselves."""
    unset = {"JAX_COMPILATION_CACHE_DIR": None, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": None}
    env = {name: str(x) for name, x in (environment() | unset | variables).items() if x is not None}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=env, cwd=ROOT, **pipes)


def finish(process):
    """Hits, result, folder, and what is on stderr."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return *out.split(), err


def run(**variables):
    return finish(start(**variables))


def test_the_second_process_finds_what_the_first_compiled_in_the_users_cache_folder(tmp_path):
    cold = run(XDG_CACHE_HOME=tmp_path)
    warm = run(XDG_CACHE_HOME=tmp_path)
    assert cold[0] == "0" != warm[0] and cold[1] == warm[1]
    assert warm[2] == str(tmp_path / "meap_jax" / "xla")
    home = run(XDG_CACHE_HOME=None, HOME=tmp_path)
    assert home[2] == str(tmp_path / ".cache" / "meap_jax" / "xla")


def test_the_users_own_folder_wins_and_an_empty_one_turns_it_off(tmp_path):
    xdg, own = tmp_path / "xdg", tmp_path / "own"
    assert run(XDG_CACHE_HOME=xdg, JAX_COMPILATION_CACHE_DIR=own)[2] == str(own)
    assert list(own.iterdir())
    hits = [run(XDG_CACHE_HOME=xdg, JAX_COMPILATION_CACHE_DIR="")[0] for _ in range(2)]
    assert hits == ["0", "0"] and not xdg.exists()


def test_a_folder_that_cannot_be_written_costs_a_line_on_stderr_and_no_more(tmp_path):
    (tmp_path / "file").write_text("in the way")
    hits, _, folder, err = run(XDG_CACHE_HOME=tmp_path / "file")
    assert (hits, folder) == ("0", "None")
    [line] = err.splitlines()
    assert "compiled programs are not kept" in line and "Not a directory" in line


def test_an_entry_cut_short_by_a_kill_is_compiled_anew(tmp_path):
    cold = run(XDG_CACHE_HOME=tmp_path)
    for entry in (tmp_path / "meap_jax" / "xla").glob("*-cache"):
        entry.write_bytes(entry.read_bytes()[:-100])
    again = run(XDG_CACHE_HOME=tmp_path)
    assert again[0] == "0" and again[1] == cold[1]
    assert "Error reading persistent compilation cache entry" in again[3]


def test_processes_that_start_together_share_a_fresh_folder(tmp_path):
    together = [start(XDG_CACHE_HOME=tmp_path) for _ in range(3)]
    assert len({finish(process)[1] for process in together}) == 1
