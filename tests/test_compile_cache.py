"""Compiled programs are kept between processes, wherever the user wants them, and never in the way of a run."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from tiny_runs import ROOT, environment

# A command that compiles two programs, and prints how many of them the cache had, their result and its folder.
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


def run(**variables):
    """Runs PROGRAM in the environment of a user, who has not set what these tests set for themselves.

    Returns:
      The number of programs that the cache had, the result, the folder, and what was logged.
    """
    ours = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "XDG_CACHE_HOME"}
    env = {name: value for name, value in environment().items() if name not in ours}
    env |= {name: str(value) for name, value in variables.items()}
    pipes = dict(capture_output=True, text=True, timeout=120, check=True)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, cwd=ROOT, **pipes)
    hits, result, folder = done.stdout.split()
    return int(hits), float(result), folder, done.stderr


def test_the_second_process_finds_what_the_first_compiled_in_the_users_cache_folder(tmp_path):
    cold = run(XDG_CACHE_HOME=tmp_path)
    warm = run(XDG_CACHE_HOME=tmp_path)
    assert cold[0] == 0 < warm[0] and cold[1] == warm[1]
    assert warm[2] == str(tmp_path / "meap_jax" / "xla")
    home = run(HOME=tmp_path)
    assert home[2] == str(tmp_path / ".cache" / "meap_jax" / "xla")


def test_the_users_own_folder_wins_and_an_empty_one_turns_it_off(tmp_path):
    xdg, own = tmp_path / "xdg", tmp_path / "own"
    assert run(XDG_CACHE_HOME=xdg, JAX_COMPILATION_CACHE_DIR=own)[2] == str(own)
    assert list(own.iterdir())
    hits = [run(XDG_CACHE_HOME=xdg, JAX_COMPILATION_CACHE_DIR="")[0] for _ in range(2)]
    assert hits == [0, 0] and not xdg.exists()


def test_a_folder_that_cannot_be_written_is_said_in_a_line_and_done_without(tmp_path):
    (tmp_path / "file").write_text("in the way")
    hits, _, folder, said = run(XDG_CACHE_HOME=tmp_path / "file")
    assert (hits, folder) == (0, "None")
    [line] = said.splitlines()
    assert "compiled programs are not kept" in line and "Not a directory" in line


def test_an_entry_cut_short_by_a_kill_is_compiled_anew(tmp_path):
    cold = run(XDG_CACHE_HOME=tmp_path)
    for entry in (tmp_path / "meap_jax" / "xla").glob("*-cache"):
        entry.write_bytes(entry.read_bytes()[:-100])
    again = run(XDG_CACHE_HOME=tmp_path)
    assert again[0] == 0 and again[1] == cold[1]
    assert "Error reading persistent compilation cache entry" in again[3]


def test_processes_that_start_together_share_a_fresh_folder(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        together = pool.map(lambda _: run(XDG_CACHE_HOME=tmp_path), range(3))
    assert len({result for _, result, *_ in together}) == 1
