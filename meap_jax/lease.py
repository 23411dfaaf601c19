"""One run per workdir: a file there names the process that works in it, and a second one is told so.

A lock of the operating system says at once whether the holder lives, wherever the file system has locks; it ends with
its process, however that dies. Buckets and some shared disks have none. There the holder changes a number in the file
every few seconds, and a process that finds a holder in it watches whether the number changes. No clocks are compared,
which differ between machines.
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from meap_jax.errors import ConfigError, UserError
from meap_jax.paths import is_url

_log = logging.getLogger(__name__)

FILE = "run.lock"
SECONDS_A_BEAT = 5.0
BEATS_TO_WATCH = 4  # A holder that changes nothing for so long is gone.
_READS, _SECONDS_BETWEEN_READS = 3, 0.2
SECONDS_TO_SETTLE = 2.0  # Without locks: of two who write at once, the one whose text is there after this holds it.


class LeaseLost(UserError, RuntimeError):
    """Another run took the workdir of this one."""


class Lease:
    """The right of this process to work in a folder, from `held`."""

    def __init__(self, folder: epath.Path):
        self._file = folder / FILE
        self._folder = folder
        self._own: dict[str, Any] = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "began": _began(os.getpid()),
            "since": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            "id": uuid.uuid4().hex,
            "beat": 0,
        }
        self._descriptor: int | None = None  # Of the local file; None for a bucket's.
        self._is_locked = False
        self._is_lost = False
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="lease", daemon=True)

    def check(self) -> None:
        """Makes sure that no other run has taken the folder since, as one may where this process stood still for long.

        Raises:
          LeaseLost: one has.
        """
        if self._is_lost:
            raise LeaseLost(
                f"another run has begun in {self._folder}, since this one (process {os.getpid()}) gave no sign of life "
                "for a while: this one ends, and what it saved is kept."
            )

    def _acquire(self) -> None:
        if not is_url(self._file):
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._is_locked = self._lock()
        holder = self._read()
        if holder and not self._is_gone(holder):
            self._watch(holder)
        self._write()
        if not self._is_locked:
            time.sleep(SECONDS_TO_SETTLE)
            if (holder := self._read()).get("id") != self._own["id"]:
                raise self._in_use(holder)
        self._beats.start()

    def _lock(self) -> bool:
        """Takes the lock of the operating system; False if this file system has none."""
        assert self._descriptor is not None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._in_use(self._read()) from error
        except OSError as error:
            _log.info("%s: no locks on this file system (%s)", self._folder, error.strerror)
            return False
        return True

    def _is_gone(self, holder: dict[str, Any]) -> bool:
        """Whether a holder is known to be gone: it was on this machine, whose processes we see, and isn't there."""
        if holder.get("machine") != self._own["machine"]:
            return False
        return self._is_locked or _began(holder.get("pid", 0)) != holder.get("began")

    def _watch(self, holder: dict[str, Any]) -> None:
        """Waits for signs of life of a holder.

        Raises:
          ConfigError: there are some.
        """
        if holder.get("machine") == self._own["machine"]:
            raise self._in_use(holder)
        seconds = SECONDS_A_BEAT * BEATS_TO_WATCH
        _log.info(
            "%s was left by process %s on %s without a word: waiting %.0f s for a sign of its life",
            self._folder, holder.get("pid"), holder.get("host"), seconds,
        )  # fmt: skip
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(SECONDS_A_BEAT / 2)
            if (now := self._read()) != holder:
                raise self._in_use(now or holder)

    def _in_use(self, holder: dict[str, Any]) -> ConfigError:
        return ConfigError(
            f"{self._folder} is in use: a run is going on there since {holder.get('since', 'a moment ago')} "
            f"(process {holder.get('pid', '?')} on {holder.get('host', 'another machine')}): let it end or stop it, or "
            "name another --workdir."
        )

    def _read(self) -> dict[str, Any]:
        """What the file says of its holder; {} if there is none, or what it says can't be that for a while."""
        for _ in range(_READS):
            try:
                if self._descriptor is None:
                    text = self._file.read_text()
                else:
                    text = os.pread(self._descriptor, 4096, 0).decode()
                found = json.loads(text)
            except FileNotFoundError:
                return {}
            except ValueError:  # Perhaps the holder writes it at this moment.
                found = None
            if isinstance(found, dict):
                return found
            time.sleep(_SECONDS_BETWEEN_READS)
        return {}

    def _write(self, content: dict[str, Any] | None = None) -> None:
        """Replaces what the file says; in place where it is locked, for a new file would have no lock."""
        text = json.dumps(self._own if content is None else content) + "\n"
        if self._descriptor is None:
            self._file.write_text(text)
            return
        os.pwrite(self._descriptor, text.encode(), 0)
        os.ftruncate(self._descriptor, len(text.encode()))

    def _beat(self) -> None:
        while not self._ended.wait(SECONDS_A_BEAT):
            with contextlib.suppress(Exception):  # Of a full disk or a bucket that is away: the run notices itself.
                holder = self._read()
                if holder and holder.get("id") != self._own["id"]:
                    self._is_lost = True
                    return
                self._own["beat"] += 1
                self._write()

    def _release(self) -> None:
        self._ended.set()
        if self._beats.is_alive():
            self._beats.join()
        if self._beats.ident is not None and not self._is_lost:
            with contextlib.suppress(Exception):
                self._write({})
        if self._descriptor is not None:
            os.close(self._descriptor)


@contextlib.contextmanager
def held(folder: epath.Path) -> Iterator[Lease]:
    """Holds a folder that exists, local or in a bucket, for this process.

    Raises:
      ConfigError: another run is going on there, or nothing can be written there.
    """
    lease = Lease(folder)
    try:
        try:
            lease._acquire()
        except ConfigError:
            raise
        except Exception as error:  # Buckets have errors of their own.
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"nothing can be written in {folder} ({reason}): name another --workdir.") from error
        yield lease
    finally:
        lease._release()


def _machine() -> str:
    """What tells the processes that we see from those of other machines, or of other containers on this one."""
    parts = [socket.gethostname()]
    for read in (
        lambda: pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with contextlib.suppress(OSError):
            parts.append(read())
    return " ".join(parts)


def _began(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did; None if there is none of this number."""
    try:
        return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
