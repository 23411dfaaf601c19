"""What the tests of bad input share: how many examples, how files are damaged, and what may come of them."""

import contextlib
import os
import subprocess
import sys

import hypothesis
import pytest
from hypothesis import strategies as st

from meap_jax.errors import UserError
from tiny_runs import PEAK, ROOT, environment

# FUZZ_EXAMPLES=100000 python -m pytest -n 0 tests/fuzz is the long run, by hand; with another seed each time.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
settings = hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    database=None,
)

few = hypothesis.settings(settings, max_examples=max(1, EXAMPLES // 4))  # Where an example takes a tenth of a second.


@contextlib.contextmanager
def refused_in_a_sentence():
    """Lets nothing through but an error for the user, which is one line that doesn't go on for ever."""
    try:
        yield
    except UserError as error:
        sentence = str(error)
        assert sentence.strip() and "\n" not in sentence and len(sentence) < 2_000, sentence


ODD_BYTES = st.sampled_from((b'"', b"{", b"[", b"\0", b"9" * 30))


@st.composite
def damaged(draw, whole: bytes):
    """A file with a few bytes changed, cut out, put in, or cut off; or bytes that have nothing to do with it."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(("change", "cut", "insert", "truncate", "repeat")))
        if kind == "change" and place < len(data):
            data[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 16))]
        elif kind == "insert":
            data[place:place] = draw(
                st.binary(min_size=1, max_size=8) | st.sampled_from((b'"', b"{", b"[", b"\0", b"9" * 30))
            )
        elif kind == "truncate":
            del data[place:]
        else:
            data[place:place] = data[place : place + 64]
    return bytes(data)


# JSON of any form, with numbers and texts that programs stumble over.
ODD = st.sampled_from(
    (0, -1, 2**31, 2**63, 2**64, 10**30, 1.5, 1e308, "", "\0", "a" * 300, "../../etc/passwd", True, None)
)
JSON = st.recursive(
    ODD | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def altered(draw, content):
    """A JSON document in which a value somewhere is another one, or gone."""
    if not isinstance(content, dict | list) or not content or draw(st.integers(0, 5)) == 0:
        return draw(JSON)
    if isinstance(content, list):
        place = draw(st.integers(0, len(content) - 1))
        return [*content[:place], draw(altered(content[place])), *content[place + 1 :]]
    key = draw(st.sampled_from(sorted(content)))
    others = {name: value for name, value in content.items() if name != key}
    if draw(st.integers(0, 5)) == 0:
        return others
    return {**others, key: draw(altered(content[key]))}


def in_little_memory(script: str, *words: object, megabytes: int, seconds: int = 120) -> str:
    """Runs Python in a process of its own that may touch so much memory; what it prints.

    The script has `allowed()`, which is called once all is imported, and ends with `report()`, which fails where the
    process has touched more since.
    """
    head = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (12 * 2**30,) * 2)  # So that a mistake costs no machine.
resource.setrlimit(resource.RLIMIT_CPU, ({seconds},) * 2)
{PEAK}
def allowed():
    global touched_before
    touched_before = peak() // 2**20
def report():
    touched = peak() // 2**20 - touched_before
    assert touched < {megabytes}, f"touched {{touched}} MB"
"""
    command = [sys.executable, "-c", head + script, *map(str, words)]

    pipes = dict(capture_output=True, text=True, timeout=2 * seconds)
    finished = subprocess.run(command, cwd=ROOT, env=environment(), **pipes)
    if finished.returncode:
        pytest.fail(f"exit code {finished.returncode}: {finished.stdout[-500:]} {finished.stderr[-1500:]}")
    return finished.stdout
