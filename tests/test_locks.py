"""The lock files pin all that the requirements files ask for, with hashes, and nothing of this machine."""

import re

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tiny_runs import ROOT

PYTHONS = ("3.11", "3.12", "3.13")


def requirements(file):
    """What a requirements file asks for, those that it names by -r too."""
    for line in (ROOT / file).read_text().splitlines():
        line = line.partition(" #")[0].strip() if not line.startswith("#") else ""
        if line.startswith("-r "):
            yield from requirements(line.removeprefix("-r "))
        elif line:
            yield Requirement(line)


def pins(file):
    """(requirement, hashes) of each pin of a lock file."""
    text = (ROOT / file).read_text()
    for entry in re.split(r"\n(?=[A-Za-z0-9])", text.replace("\\\n", " ")):
        first = entry.splitlines()[0] if entry else "#"
        if not first.startswith("#"):
            yield Requirement(first.partition(" --hash")[0].strip()), re.findall(r"--hash=(\S+)", first)


def environment(python):
    return {"python_version": python, "python_full_version": f"{python}.5", "sys_platform": "linux"}


def applies(requirement, python):
    return requirement.marker is None or Marker(str(requirement.marker)).evaluate(environment(python))


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("file", ["requirements", "requirements-dev"])
def test_each_requirement_is_pinned_once_for_each_python_within_its_bounds(file, python):
    pinned = {}
    for pin, _ in pins(f"{file}.lock"):
        if applies(pin, python):
            name = canonicalize_name(pin.name)
            assert name not in pinned, f"{name} is pinned twice for Python {python}"
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            pinned[name] = specifier.version
    for wanted in requirements(f"{file}.txt"):
        if applies(wanted, python):
            version = pinned[canonicalize_name(wanted.name)]
            assert wanted.specifier.contains(version), f"{wanted} is pinned to {version}: make lock"


@pytest.mark.parametrize("file", ["requirements.lock", "requirements-dev.lock"])
def test_every_pin_has_hashes_and_no_line_is_of_a_machine_or_an_index(file):
    found = list(pins(file))
    assert len(found) > 50
    assert all(hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in hashes) for _, hashes in found)
    text = (ROOT / file).read_text()
    assert not re.search(r"://|^-|^\.|(?<!\w)/\w|--(index|find|extra|trusted)", text, re.MULTILINE)


def test_both_locks_agree():
    dev = {str(pin) for pin, _ in pins("requirements-dev.lock")}
    assert {str(pin) for pin, _ in pins("requirements.lock")} <= dev
