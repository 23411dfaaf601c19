"""Runs whose disk is full or cannot be written end in a sentence, and go on bit for bit when there is room again.

The disk is a tmpfs of some MB in a mount namespace of its own, which needs no root.
"""

import contextlib
import pathlib
import shutil
import subprocess
import threading
import time

import pytest

from faults import harness

DISK_BYTES = 6 * 2**20
LONGEST_EXIT = 90.0  # Seconds, from the moment at which the disk is full.


class SmallDisk:
    """A disk that is seen as `path` in its namespace, and as `outside` from here."""

    def __init__(self, folder: pathlib.Path):
        folder.mkdir()
        script = 'mount -t tmpfs -o size="$1" tmpfs "$2" && echo ready && exec sleep 3600'
        words = ["unshare", "-rm", "sh", "-c", script, "sh", str(DISK_BYTES), str(folder)]
        self._keeper = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if self._keeper.stdout.readline() != "ready\n":
            self._keeper.kill()
            pytest.skip(f"no disk can be mounted here: {self._keeper.stderr.read().strip()}")
        self.path, self.outside = folder, pathlib.Path(f"/proc/{self._keeper.pid}/root{folder}")
        self.prefix = ("nsenter", f"--target={self._keeper.pid}", "--user", "--mount", "--preserve-credentials")

    def run(self, *words: str) -> None:
        """Runs a command in the namespace."""
        subprocess.run([*self.prefix, *words], check=True)

    def close(self) -> None:
        """Ends the namespace, and the disk with it."""
        self._keeper.kill()
        self._keeper.wait()

    @contextlib.contextmanager
    def full(self):
        """Within it, every byte that becomes free is taken at once."""
        stop = threading.Event()
        with (self.outside / "filler").open("ab", buffering=0) as filler:
            self._fill(filler)
            thread = threading.Thread(target=self._keep_full, args=(filler, stop))
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()
        (self.outside / "filler").unlink()

    def _fill(self, filler) -> None:
        for size in (2**16, 4096):
            with contextlib.suppress(OSError):
                while True:
                    filler.write(b"\0" * size)

    def _keep_full(self, filler, stop) -> None:
        while not stop.wait(0.002):
            self._fill(filler)


@pytest.fixture
def disk(tmp_path):
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        pytest.skip("needs unshare and nsenter, of util-linux")
    made = SmallDisk(tmp_path / "disk")
    yield made
    made.close()


def start(disk, tmp_path, reference):
    return harness.Group(
        disk.path / "run", prefix=disk.prefix, logs=tmp_path, seen=disk.outside / "run",
        **harness.setting(reference.data),
    )  # fmt: skip


def assert_one_sentence(group, seconds, *names):
    """Ended with 1 and one line that begins with `error:` and has one of the names; no traceback."""
    codes, said = group.wait(seconds), group.said()
    assert codes == [harness.EXIT_USER_ERROR], (codes, said[-4000:])
    assert "Traceback" not in said, said[-4000:]
    sentences = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and any(name in sentences[0].lower() for name in names), said[-4000:]


def assert_goes_on(disk, tmp_path, reference):
    """Started again with room, the run ends, and nothing differs."""
    group = start(disk, tmp_path, reference)
    assert group.wait(harness.LONGEST_WAIT) == [0], group.said()[-4000:]
    wrong = harness.num_wrong(disk.outside / "run", reference.workdir)
    assert (wrong, harness.leftovers(disk.outside / "run")) == (0, [])
    return wrong


FULL = "no space", "full"
MOMENTS = {
    "records": lambda run: harness.logged(run) >= 5,
    "save": lambda run: harness.is_saving(run) and harness.logged(run) >= 10,
    "evaluation": lambda run: harness.logged(run) >= 19,
    "steps": lambda run: harness.logged(run) >= 33,
    "second save": lambda run: harness.is_saving(run) and harness.logged(run) >= 50,
}


def fill_at(moment, disk, tmp_path, reference, record):
    group, run = start(disk, tmp_path, reference), disk.outside / "run"
    outcome = dict(kind="disk", fault="full", moment=moment, survived=False)
    try:
        while not MOMENTS[moment](run):
            assert not group.is_over(), group.said()[-4000:]
            time.sleep(harness.POLL_SECONDS)
        began = time.monotonic()
        with disk.full():
            assert_one_sentence(group, LONGEST_EXIT, *FULL)
            outcome["seconds"] = time.monotonic() - began
        outcome["wrong"] = assert_goes_on(disk, tmp_path, reference)
        outcome["survived"] = True
    finally:
        group.kill()
        record(outcome)


def test_a_disk_that_fills_up_while_records_are_written_ends_the_run_in_a_sentence(
    disk, tmp_path, reference_of, record
):
    fill_at("records", disk, tmp_path, reference_of(), record)


@pytest.mark.slow
@pytest.mark.parametrize("moment", sorted(MOMENTS.keys() - {"records"}))
@pytest.mark.parametrize("attempt", range(2))
def test_a_disk_that_fills_up_at_another_moment_does_too(moment, attempt, disk, tmp_path, reference_of, record):
    fill_at(moment, disk, tmp_path, reference_of(), record)


def test_a_disk_that_is_full_at_the_start_leaves_nothing_behind(disk, tmp_path, reference_of, record):
    reference, run = reference_of(), disk.outside / "run"
    outcome = dict(kind="disk", fault="full", moment="start", survived=False)
    try:
        with disk.full():
            assert_one_sentence(start(disk, tmp_path, reference), LONGEST_EXIT, *FULL)
            empty = {path.name for path in run.rglob("*") if path.is_file() and not path.stat().st_size}
            assert empty <= {"run.lock"}, "an empty file was left"  # A lock has to have a file.
        outcome["wrong"] = assert_goes_on(disk, tmp_path, reference)
        outcome["survived"] = True
    finally:
        record(outcome)


@pytest.mark.slow
def test_a_disk_that_cannot_be_written_is_named(disk, tmp_path, reference_of, record):
    reference, run = reference_of(), disk.outside / "run"
    outcome = dict(kind="disk", fault="read-only", moment="start", survived=False)
    try:
        disk.run("mount", "-o", "remount,ro", str(disk.path))
        assert_one_sentence(start(disk, tmp_path, reference), LONGEST_EXIT, "read-only", "written")
        assert not run.exists()
        disk.run("mount", "-o", "remount,rw", str(disk.path))
        group = start(disk, tmp_path, reference)
        while harness.logged(run) < 25:
            assert not group.is_over(), group.said()[-4000:]
            time.sleep(0.01)
        group.kill()
        disk.run("mount", "-o", "remount,ro", str(disk.path))
        assert_one_sentence(start(disk, tmp_path, reference), LONGEST_EXIT, "read-only", "written")
        disk.run("mount", "-o", "remount,rw", str(disk.path))
        outcome["wrong"] = assert_goes_on(disk, tmp_path, reference)
        outcome["survived"] = True
    finally:
        record(outcome)
