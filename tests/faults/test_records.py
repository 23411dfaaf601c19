"""A damaged line in metrics.jsonl costs no good record: the run goes on with all others, or stops in a sentence."""

import shutil

import pytest

from faults import harness

HALF = harness.STEPS // 2
# What a line of its own, between two good records, may hold.
JUNK = {
    "a blank line": b"\n",
    "NULs": b"\0" * 300 + b"\n",
    "NULs in front of a record": None,
    "no UTF-8": b'{"step": 7, "loss": "\xff\xfe"}\n',
    "null": b"null\n",
    "half a record": b'{"step": 93, "lo\n',
    "a list": b"[1, 2]\n",
    "no step": b'{"loss": 1.0}\n',
    "a record twice": None,
}


def damaged(lines, how, at):
    """The lines with such a thing after the first `at`."""
    if how == "a record twice":
        return [*lines[:at], lines[at - 1], *lines[at:]]
    if how == "NULs in front of a record":
        return [*lines[:at], b"\0" * 50 + lines[at], *lines[at + 1 :]]
    return [*lines[:at], JUNK[how], *lines[at:]]


def check(how, at, workdir, reference, record):
    shutil.copytree(reference.workdir, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(harness.STEPS))  # So that there is something left to do.
    file = workdir / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    content = b"".join(damaged(lines, how, at))
    file.write_bytes(content)
    outcome = dict(kind="records", how=how, outcome="wrong")
    try:
        group = harness.Group(workdir, **harness.setting(reference.data))
        (code,), said = group.wait(harness.LONGEST_WAIT), group.said()
        assert "Traceback" not in said, said[-4000:]
        if code == harness.EXIT_USER_ERROR:
            assert "error: " in said and "metrics.jsonl" in said.rpartition("error: ")[2], said[-4000:]
            assert file.read_bytes() == content
            outcome["outcome"] = "sentence"
        else:
            assert code == 0, said[-4000:]
            lost = {at + 1} if how == "NULs in front of a record" else set()
            expected = [r for r in harness.results(reference.workdir) if r["step"] not in lost]
            found = [r for r in harness.results(workdir) if r["step"] not in lost]
            assert found == expected
            outcome["outcome"] = "same"
    finally:
        record(outcome)


def test_a_blank_line_costs_no_record(workdir, reference_of, record):
    check("a blank line", HALF, workdir, reference_of(), record)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, HALF, harness.STEPS - harness.SAVE_EVERY])
@pytest.mark.parametrize("how", JUNK)
def test_a_damaged_line_costs_no_other_record(how, at, workdir, reference_of, record):
    check(how, at, workdir, reference_of(), record)
