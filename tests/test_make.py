"""`make .venv`: which interpreter it uses, when it installs, and what it says when it cannot.

Each test has its own copy of the Makefile and really runs it. Environments are real too, but for
their pip: a stand-in that writes down how it was called, so that a test takes a second.
"""

import os
import shlex
import shutil
import subprocess
import sys

import pytest

from tiny_runs import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

PIP = """
import os, pathlib, signal, sys
with open("pip-calls", "a") as calls:
    print(*sys.argv[1:], file=calls)
if pathlib.Path("pip-fails").exists():
    sys.exit(1)
if pathlib.Path("pip-is-killed").exists():
    os.kill(os.getppid(), signal.SIGKILL)
"""

# Of a supported interpreter that is installed elsewhere than the one that runs this.
PROBE = f"""
import ensurepip, os, sys
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) or os.path.samefile(sys.base_prefix, {sys.base_prefix!r}))
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder, with a space in its name, that has the Makefile and requirements files."""
    folder = tmp_path / "check out"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "requirements.txt").write_text("jax\n")
    (folder / "requirements-dev.txt").write_text("-r requirements.txt\npytest\n")
    return folder


def make(*arguments, python=None, cwd="/", target=".venv"):
    """Types `make [arguments] TARGET` in the directory `cwd`."""
    of_this_run = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON", "PYTHONPATH")
    environment = {name: x for name, x in os.environ.items() if name not in of_this_run}
    if python:
        environment["PYTHON"] = str(python)
    command = ["make", "--no-print-directory", *map(str, arguments), target]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)


def interpreter(folder, python=sys.executable, **modules):
    """A script that is `python` with other `modules`, and whose environments have our pip."""
    script, path, pip = folder / "python", folder / "modules", folder / "pip"
    path.mkdir(parents=True)
    for name, text in modules.items():
        (path / f"{name}.py").write_text(text)
    pip.mkdir()
    (pip / "__main__.py").write_text(PIP)
    python, path, pip = (shlex.quote(str(x)) for x in (python, path, pip))
    script.write_text(f"""#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
  {python} "$@" --without-pip && cp -r {pip} .venv/lib/python3*/site-packages/
else
  PYTHONPATH={path} exec {python} "$@"
fi
""")
    script.chmod(0o755)
    return script


@pytest.fixture
def python(tmp_path):
    """The interpreter that runs this test, but for its environments' pip."""
    return interpreter(tmp_path / "interpreter")


def installs(checkout):
    """How pip was called in `checkout`, one line a call."""
    return (checkout / "pip-calls").read_text().splitlines()


def sentence(answer):
    """The one line on stderr that is not make's own, of a command that failed."""
    assert answer.returncode != 0
    lines = [line for line in answer.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1, answer.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("module", "text", "expected"),
    [
        # What Debian's python3 does until python3-venv is installed.
        ("ensurepip", "raise ModuleNotFoundError('No module named ensurepip')", "python3-venv"),
        ("sitecustomize", "import sys; sys.version_info = (2, 7, 18)", "3.11, 3.12 or 3.13 and {} is Python 2.7.18"),
        ("sitecustomize", "import sys; sys.version_info = (3, 10, 13)", "3.11, 3.12 or 3.13 and {} is Python 3.10.13"),
        ("sitecustomize", "import sys; sys.version_info = (3, 14, 0)", "3.11, 3.12 or 3.13 and {} is Python 3.14.0"),
    ],
)
def test_a_python_that_will_not_do_gets_one_sentence(checkout, tmp_path, module, text, expected):
    python = interpreter(tmp_path / "python", **{module: text})
    assert expected.format(python) in sentence(make("-C", checkout, python=python))
    assert not (checkout / ".venv").exists()


def test_from_another_directory_it_installs_once_and_a_missing_python_costs_nobody_an_environment(
    checkout, python, tmp_path
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    answer = make("-f", checkout / "Makefile", python=python, cwd=elsewhere)
    assert answer.returncode == 0, answer.stderr
    assert (checkout / ".venv").exists() and not list(elsewhere.iterdir())
    assert "no-such-python" in sentence(make("-C", checkout, python="no-such-python"))
    for python_again in (None, python):
        again = make("-C", checkout, python=python_again)
        assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert installs(checkout) == ["install --disable-pip-version-check -r requirements-dev.txt"]


@pytest.mark.parametrize("accident", ["pip-fails", "pip-is-killed"])
def test_install_cut_short_is_begun_again(checkout, python, accident):
    (checkout / accident).touch()
    assert make("-C", checkout, python=python).returncode != 0
    (checkout / accident).unlink()
    (checkout / ".venv" / "half-written").touch()

    assert make("-C", checkout, python=python).returncode == 0
    assert len(installs(checkout)) == 2
    assert not (checkout / ".venv" / "half-written").exists()


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_changed_requirements_are_installed_into_the_same_environment(checkout, python, file):
    make("-C", checkout, python=python)
    (checkout / ".venv" / "installed-by-the-user").touch()
    before = (checkout / file).read_text()
    (checkout / file).write_text(f"{before}flax\n")
    for _ in range(2):
        assert make("-C", checkout).returncode == 0
        assert len(installs(checkout)) == 2
    assert (checkout / ".venv" / "installed-by-the-user").exists()

    # After an update that failed some of it may be there: what was installed before is not what is there now.
    (checkout / file).write_text(before)
    (checkout / "pip-fails").touch()
    assert make("-C", checkout).returncode != 0
    (checkout / file).write_text(f"{before}flax\n")
    (checkout / "pip-fails").unlink()
    assert make("-C", checkout, python=python).returncode == 0
    assert len(installs(checkout)) == 4


def test_another_interpreter_rebuilds_and_is_kept_when_none_is_named(checkout, python, tmp_path):
    installed = filter(shutil.which, ("/usr/bin/python3", "python3.11", "python3.12", "python3.13"))
    probes = (subprocess.run([name, "-c", PROBE], capture_output=True) for name in installed)
    other = next((probe.args[0] for probe in probes if probe.returncode == 0), None)
    if other is None:
        pytest.skip("needs a second Python of 3.11 to 3.13")
    make("-C", checkout, python=python)
    (checkout / ".venv" / "of-the-first").touch()

    assert make("-C", checkout, python=interpreter(tmp_path / "other", other)).returncode == 0
    assert not (checkout / ".venv" / "of-the-first").exists()
    assert make("-C", checkout).returncode == 0
    assert len(installs(checkout)) == 2


OLDER = (
    "install --quiet --disable-pip-version-check --no-deps --target .parity/transformers4 "
    "-r requirements-transformers4.txt"
)


@pytest.mark.parametrize("name, more", [("beam", []), ("parity", [OLDER])])
def test_an_environment_in_front_of_venv_has_its_packages_and_is_made_anew_for_other_requirements(
    checkout, python, name, more
):
    environment, requirements = checkout / f".{name}", checkout / f"requirements-{name}.txt"
    requirements.touch()
    (checkout / "requirements-transformers4.txt").touch()
    answer = make("-C", checkout, python=python, target=environment.name)
    assert answer.returncode == 0, answer.stderr
    assert installs(checkout)[1:] == [f"install --quiet --disable-pip-version-check -r {requirements.name}", *more]
    (packages,) = (checkout / ".venv" / "lib").glob("python3*/site-packages")
    packages.joinpath("of_venv.py").touch()
    subprocess.run([environment / "bin" / "python", "-c", "import of_venv"], check=True)

    assert make("-C", checkout, target=environment.name).stdout == ""
    (environment / "of-the-first").touch()
    requirements.write_text("torch\n")
    assert make("-C", checkout, target=environment.name).returncode == 0
    assert not (environment / "of-the-first").exists()


@pytest.mark.parametrize("name", ["cloud", "audit"])
def test_an_environment_beside_venv_is_made_once_and_anew_for_other_requirements(checkout, tmp_path, python, name):
    # Its own venv has the stand-in for pip too.
    text = (
        python.read_text()
        .replace("cp -r", f"for to in .venv .{name}; do [ ! -d $to ] || cp -r")
        .replace(" .venv/lib/python3*/site-packages/", " $to/lib/python3*/site-packages/; done")
    )
    python.write_text(text)
    environment, requirements = checkout / f".{name}", checkout / f"requirements-{name}.txt"
    requirements.write_text("a\n")
    (checkout / ".venv").mkdir()
    assert make("-C", checkout, python=python).returncode == 0
    fake = checkout / ".venv" / "bin" / "python"
    fake.unlink()
    fake.symlink_to(python)
    for _ in range(2):
        answer = make("-C", checkout, target=environment.name)
        assert answer.returncode == 0, answer.stderr
    asked = [f"install --quiet --disable-pip-version-check -r {requirements.name}"]
    assert installs(checkout)[1:] == asked
    (environment / "of-the-first").touch()
    requirements.write_text("b\n")
    assert make("-C", checkout, target=environment.name).returncode == 0
    assert not (environment / "of-the-first").exists() and installs(checkout)[1:] == asked * 2
