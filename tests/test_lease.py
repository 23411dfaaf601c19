"""One run per workdir, on disks with locks, on those without, and in buckets."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from meap_jax import lease as lease_lib
from meap_jax.errors import ConfigError
from meap_jax.lease import FILE, LeaseLost, held
from tiny_runs import ROOT

HOLD = """
import sys, time
from etils import epath
from meap_jax.lease import held
with held(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds `tmp_path`."""
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def quick(monkeypatch):
    """Signs of life every tenth of a second."""
    monkeypatch.setattr(lease_lib, "SECONDS_A_BEAT", 0.1)
    monkeypatch.setattr(lease_lib, "SECONDS_TO_SETTLE", 0.2)


@pytest.fixture
def without_locks(monkeypatch):
    """As on a file system that has none."""

    def flock(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)


def of_another_machine(folder, **changes):
    """Leaves the file of a run on another machine."""
    holder = {
        "host": "tpu-7",
        "machine": "another",
        "pid": 12,
        "began": 5,
        "since": "2026-11-30 10:00:00 UTC",
        "id": "x",
    }
    (epath.Path(folder) / FILE).write_text(json.dumps(holder | {"beat": 3} | changes))


def test_a_second_process_is_told_which_one_works_there_and_since_when(tmp_path, holder):
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught, held(epath.Path(tmp_path)):
        pass
    text = str(caught.value)
    assert f"{tmp_path} is in use: a run is going on there since 20" in text and f"(process {holder.pid} on " in text
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_was_killed_holds_nothing(tmp_path, holder, number):
    holder.send_signal(number)
    holder.wait()
    began = time.monotonic()
    with held(epath.Path(tmp_path)):
        assert time.monotonic() - began < 2


def test_a_process_that_stands_still_holds_what_it_held(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(ConfigError, match="is in use"), held(epath.Path(tmp_path)):
        pass


def test_the_folder_is_free_again_at_the_end_and_inside_one_process_too(tmp_path):
    for _ in range(3):
        with held(epath.Path(tmp_path)) as lease:
            lease.check()
            with pytest.raises(ConfigError, match="is in use"), held(epath.Path(tmp_path)):
                pass
    assert json.loads((tmp_path / FILE).read_text()) == {}


def test_without_locks_a_live_process_of_this_machine_is_known_by_its_number(tmp_path, holder, without_locks, quick):
    with pytest.raises(ConfigError, match="is in use"), held(epath.Path(tmp_path)):
        pass
    holder.kill()
    holder.wait()
    with held(epath.Path(tmp_path)):
        pass


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_run_on_another_machine_that_gives_no_sign_of_life_is_waited_for_and_replaced(
    place, tmp_path, bucket, quick, caplog
):
    folder = bucket if place == "bucket" else epath.Path(tmp_path)
    of_another_machine(folder)
    with caplog.at_level("INFO", logger="meap_jax"), held(folder) as lease:
        time.sleep(0.4)
        lease.check()
        assert json.loads((folder / FILE).read_text())["beat"] >= 1
    assert "was left by process 12 on tpu-7 without a word" in caplog.text


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_run_on_another_machine_that_gives_signs_of_life_is_left_alone(place, tmp_path, bucket, quick, monkeypatch):
    folder = bucket if place == "bucket" else epath.Path(tmp_path)
    of_another_machine(folder)
    beats = iter(range(4, 100))

    def sleep(seconds):
        of_another_machine(folder, beat=next(beats))

    monkeypatch.setattr(lease_lib.time, "sleep", sleep)
    with pytest.raises(ConfigError, match=r"since 2026-11-30 10:00:00 UTC \(process 12 on tpu-7\)"), held(folder):
        pass
    assert json.loads((folder / FILE).read_text())["id"] == "x"


def test_of_two_that_start_at_once_in_a_bucket_the_one_that_wrote_last_holds_it(bucket, quick, monkeypatch):
    monkeypatch.setattr(lease_lib.time, "sleep", lambda seconds: of_another_machine(bucket))
    with pytest.raises(ConfigError, match="is in use"), held(bucket):
        pass


def test_a_run_whose_workdir_was_taken_is_told_so_and_leaves_the_file_to_the_other(bucket, quick):
    with held(bucket) as lease:
        of_another_machine(bucket)
        time.sleep(0.4)
        with pytest.raises(LeaseLost, match="another run has begun in gs://bucket/run"):
            lease.check()
    assert json.loads((bucket / FILE).read_text())["id"] == "x"


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"[]", b"null", b'{"pid": "x"}', b"\xff\xfe", b'{"beat": 1'])
def test_a_file_that_says_nothing_is_no_obstacle(tmp_path, content, quick):
    (tmp_path / FILE).write_bytes(content)
    with held(epath.Path(tmp_path)):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises(ConfigError, match=f"nothing can be written in {tmp_path} "), held(epath.Path(tmp_path)):
        pass
