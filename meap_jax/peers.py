"""Watches the other processes of a run: when one ends, hangs or is killed, the others stop with one sentence.

Each process has a thread that beats every second, under its key in the key-value store of jax's coordination service,
and reads what the others wrote there; a second thread judges. A host that stops for a reason writes its sentence
before it exits. One that is killed is noticed by its connection to host 0 (`meap_jax.rollcall`), one that hangs, or
whose machine is gone, by beats that are missing. In a run of one process all of this does nothing.
"""

import collections
import contextlib
import json
import logging
import multiprocessing
import os
import re
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from meap_jax.coordinator import Coordinator
from meap_jax.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, ConfigError, Preempted, UserError
from meap_jax.pulse import SECONDS_IF_CLOSED, Pulse
from meap_jax.rollcall import Facts, differences
from meap_jax.stacks import dump_stacks

_log = logging.getLogger(__name__)

SECONDS_BETWEEN_BEATS = 1.0
SECONDS_TO_SAY_IT_TOO = 2.0  # A mistake that all hosts make is reported by each itself.
SECONDS_TO_TELL = 5.0  # That a host gives the others at its end.
SECONDS_TO_FINISH = 7_200.0  # After a host that has done all; another may still write files.
SECONDS_TO_FOLLOW = 60.0  # After a host left in good order with a code such as that of preemption.
AGAIN = "Start the run again: it goes on from its last checkpoint"
_FOLDER = "meap_jax/watch/"

# What the loss of a peer looks like in the process that talks to it, from Gloo, NCCL, gRPC and jax's service.
_LOST_CONNECTION = re.compile(
    r"[Gg]loo|[Cc]onnection (closed|reset|refused)|[Ss]ocket closed|[Bb]roken pipe|\bUNAVAILABLE\b|"
    r"\bDEADLINE_EXCEEDED\b|\bABORTED\b|\bCANCELLED\b|[Cc]oordination service|[Bb]arrier|[Hh]eartbeat|\bpeer\b"
)


class End(NamedTuple):
    """How a host ended."""

    code: int  # Its exit code.
    sentence: str
    host: int  # That is the cause: itself, or the one that it stopped for.
    orderly: bool = False  # It did all that it had to do.


class Peers:
    """The other processes of this run, as this one sees them."""

    def __init__(
        self, client: Any, index: int, count: int, connections: Mapping[int, socket.socket], timeout: float,
        coordinator: Coordinator | None,
    ):  # fmt: skip
        self.client, self.index, self.count = client, index, count
        self.coordinator = coordinator
        self.ends: dict[int, End] = {}
        self._others = set(range(count)) - {index}
        self._connections = {connection: host for host, connection in connections.items()}
        self._pulse = Pulse(self._others, timeout, time.monotonic())
        self.timeout = timeout
        self._first_seen: dict[int, float] = {}
        self._news: dict[str, str] = {}
        self._dumped: str | None = None
        self._lost: list[int] = []
        self._times: collections.Counter[str] = collections.Counter()
        self._stopping, self._ending = threading.Event(), threading.Lock()
        for target in (self._beat, self._judge):
            threading.Thread(target=target, name=f"peers{target.__name__}", daemon=True).start()

    # ------------------------------------------------------------------------------------------------------ threads

    def _beat(self) -> None:
        """Beats, and reads what the others wrote; may block while the service can't be reached."""
        number = 0
        while not self._stopping.is_set():
            with contextlib.suppress(Exception):  # `_judge` sees that rounds are missing.
                number += 1
                self.client.key_value_set(f"{_FOLDER}beat/{self.index}", str(number), allow_overwrite=True)
                entries = self.client.key_value_dir_get(_FOLDER)
                self._news = {name.rpartition(_FOLDER)[2]: value for name, value in entries}
                beats = {int(name[5:]): value for name, value in self._news.items() if name.startswith("beat/")}
                self._pulse.hear(beats, time.monotonic())
            self._stopping.wait(SECONDS_BETWEEN_BEATS)

    def _judge(self) -> None:
        while not self._stopping.is_set():
            self._look_at_connections(0.5)
            now = time.monotonic()
            self._read_ends(now)
            self._answer_for_stacks()
            if not self._ending.locked() and (end := self._reason_to_stop(now)) is not None:
                self.stop(end, say=True)

    def _look_at_connections(self, seconds: float) -> None:
        if not self._connections:
            time.sleep(seconds)
            return
        with selectors.DefaultSelector() as selector:
            for connection in self._connections:
                selector.register(connection, selectors.EVENT_READ)
            ready = [
                connection
                for key, _ in selector.select(seconds)
                for connection in self._connections
                if connection is key.fileobj
            ]
        for connection in ready:
            with contextlib.suppress(OSError):
                if connection.recv(2**16):
                    continue
            self._pulse.close(self._connections.pop(connection), time.monotonic())

    def _read_ends(self, now: float) -> None:
        for name, value in list(self._news.items()):
            if name.startswith("end/") and (host := int(name[4:])) not in self.ends:
                self.ends[host], self._first_seen[host] = End(**json.loads(value)), now

    def _reason_to_stop(self, now: float) -> End | None:
        """Why this process must end now; None while all is well."""
        for host in sorted(self._others & self.ends.keys(), key=lambda host: self.ends[host].host != host):
            end, seconds = self.ends[host], now - self._first_seen[host]
            if end.orderly and end.code and self.index not in self.ends and seconds > SECONDS_TO_FOLLOW:
                return End(end.code, f"host {host} left with exit code {end.code}, {seconds:.0f} s ago", host)
            if not end.orderly and seconds >= (SECONDS_TO_SAY_IT_TOO if end.code == 1 else 0):
                return end
        self._lost, sentence = self._pulse.lost(self.ends.keys(), now)
        if self._lost:
            return End(EXIT_PREEMPTED, f"{sentence}. {AGAIN}", self._lost[0])
        return None

    def numbered(self, topic: str) -> str:
        """The topic with a number, so that a process can come to it again; all hosts do as often."""
        self._times[topic] += 1
        return f"{topic}-{self._times[topic]}"

    # ---------------------------------------------------------------------------------------------------------- end

    def stop(self, end: End, *, say: bool) -> None:
        """Ends this process, after it told the others; does not return, and the first caller's end counts."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # Another thread is ending this process.
        sys.stdout.flush()
        if say:
            whole = end.sentence if end.code == EXIT_PREEMPTED else f"host {end.host} stopped: {end.sentence}"
            print(f"error: {whole.rstrip('.')}.", file=sys.stderr, flush=True)
        threading.Thread(target=self._tell, args=(end,), daemon=True).start()
        self._wait_until_told()
        for child in multiprocessing.active_children():
            child.kill()
        if self.coordinator is not None:
            self.coordinator.end_with_this_process()
        sys.stderr.flush()
        os._exit(end.code)

    def _tell(self, end: End) -> None:
        with contextlib.suppress(Exception):
            self.client.key_value_set(f"{_FOLDER}end/{self.index}", json.dumps(end._asdict()), allow_overwrite=True)
            self.ends[self.index] = end

    def _wait_until_told(self) -> None:
        """Waits until the others can know; host 0, until they ended: a service that ends first makes them abort."""
        limit = time.monotonic() + SECONDS_TO_TELL
        judges = threading.current_thread().name == "peers_judge"
        while time.monotonic() < limit:
            if self.index in self.ends and not (self.index == 0 and set(self._connections.values()) - set(self._lost)):
                break
            if judges:
                self._look_at_connections(0.05)
            else:
                time.sleep(0.05)

    def finish(self, code: int) -> None:
        """Says that this process has done all it had to, and waits until all have; the watch is over then."""
        self._tell(End(code, "", self.index, orderly=True))
        limit = time.monotonic() + (SECONDS_TO_FOLLOW if code else SECONDS_TO_FINISH)
        while not self.ends.keys() >= self._others:
            if time.monotonic() > limit:
                self.stop(End(code, "", self.index, orderly=True), say=False)
            time.sleep(0.05)
        self._stopping.set()

    # ------------------------------------------------------------------------------------------------------- stacks

    def ask_for_stacks(self, folder: str) -> None:
        """Asks every host for its stacks; this one writes them at once."""
        request = json.dumps({"folder": folder, "of": self.index, "at": time.time()})
        self._dumped = request
        self.client.key_value_set(f"{_FOLDER}stacks", request, allow_overwrite=True)  # First: a disk may hang.
        dump_stacks(epath.Path(folder), self.index)

    def _answer_for_stacks(self) -> None:
        request = self._news.get("stacks")
        if request is not None and request != self._dumped:
            self._dumped = request
            folder = epath.Path(json.loads(request)["folder"])
            threading.Thread(target=dump_stacks, args=(folder, self.index), daemon=True).start()  # A disk may hang.


_peers: Peers | None = None
SentenceOf = Callable[[BaseException], str | None]


def begin(
    client: Any, index: int, count: int, connections: Mapping[int, socket.socket], timeout: float,
    coordinator: Coordinator | None = None,
) -> None:  # fmt: skip
    """Begins to watch the other processes of this run; `meap_jax.hosts` calls it once they are connected.

    Args:
      client: of jax's coordination service.
      index, count: of this process, and of all.
      connections: to host 0, or on host 0 to each of the others.
      timeout: seconds without a beat after which a host counts as lost.
      coordinator: on host 0, the process of the service.
    """
    global _peers
    _peers = Peers(client, index, count, connections, timeout, coordinator)


def check_same(topic: str, facts: Facts, advice: str) -> None:
    """Compares facts between all hosts; the same on all of them in the end, and needs no device.

    It waits for all of them, however long one takes; a host that ends is noticed by the watch.

    Args:
      topic: a name that this comparison has on all hosts.
      facts: {name: value} as text.
      advice: what to do if they differ, after the differences.

    Raises:
      ConfigError: on every host, naming hosts, fields and both values.
    """
    if _peers is None:
        return
    client, index, folder = _peers.client, _peers.index, f"meap_jax/same/{_peers.numbered(topic)}/"
    if index == 0:
        client.key_value_set(folder + "facts", json.dumps(dict(facts)))
    [first] = _wait_for_entries(client, folder + "facts", 1)
    client.key_value_set(f"{folder}found/{index}", differences({0: json.loads(first), index: facts}) if index else "")
    found = _wait_for_entries(client, folder + "found/", _peers.count)
    problems = [problem for problem in found if problem]
    if problems:
        more = f"; and {len(problems) - 3} hosts more" if len(problems) > 3 else ""
        raise ConfigError(f"{'; '.join(problems[:3])}{more}: {advice}")


def _wait_for_entries(client: Any, folder: str, count: int) -> list[str]:
    """The values below a folder of the key-value store, or of one key, once there are so many; by host."""
    parent = folder.rpartition("/")[0] + "/"
    while True:
        entries = {name: value for name, value in client.key_value_dir_get(parent) if folder in name}
        if len(entries) >= count:
            return [entries[name] for name in sorted(entries, key=lambda name: (len(name), name))]
        time.sleep(0.1)


def wait_for_first(topic: str) -> None:
    """Host 0 says that it has done something, and the others wait until it has, however long that takes.

    A collective would not do: Gloo's end with an error after 30 s.
    """
    if _peers is None:
        return
    client, key = _peers.client, f"meap_jax/done/{_peers.numbered(topic)}"
    if _peers.index == 0:
        client.key_value_set(key, "")
    while not any(name.endswith(key) for name, _ in client.key_value_dir_get("meap_jax/done/")):
        time.sleep(0.2)


@contextlib.contextmanager
def telling(sentence_of: SentenceOf = lambda error: None, *, finishes: bool = False) -> Iterator[None]:
    """Around work that several processes share: an error in it ends this process at once, and tells the others.

    Without, an error would first pass clean-ups that wait for hosts which wait for this one. In a run of one process
    it does nothing. `Preempted` and SystemExit are no errors: hosts leave in good order, all of them.

    Args:
      sentence_of: gives a sentence for errors that are no UserErrors but a user can do something about, else None.
      finishes: the work is the whole command, after which hosts wait for each other.
    """
    code = 0
    try:
        yield
    except Preempted:
        code = EXIT_PREEMPTED
        raise
    except (Exception, KeyboardInterrupt) as error:
        leave(error, sentence_of)
        raise
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    finally:
        if finishes and _peers is not None:
            _peers.finish(code)


def leave(error: BaseException, sentence_of: SentenceOf) -> None:
    """Ends this process for an error, if there are other hosts, and tells them; returns in a run of one process.

    An error that the loss of another host may have caused is held back until that host is known.

    Args:
      error: that ends this process.
      sentence_of: see `telling`.
    """
    if _peers is None:
        return
    sentence = str(error) if isinstance(error, UserError) else sentence_of(error)
    if sentence is not None:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        _peers.stop(End(1, sentence, _peers.index), say=False)
    if isinstance(error, KeyboardInterrupt):
        print("stopped; what was saved is kept.", file=sys.stderr, flush=True)
        _peers.stop(End(EXIT_INTERRUPTED, "it was interrupted", _peers.index), say=False)
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    # jax raises Gloo's errors as ValueErrors too.
    if isinstance(error, RuntimeError | OSError | ValueError) and _LOST_CONNECTION.search(reason):
        time.sleep(_peers.timeout + SECONDS_IF_CLOSED)  # The judge ends this process meanwhile.
        sentence = f"host {_peers.index} lost its connection to the others, which are all alive ({reason})"
        _peers.stop(End(EXIT_PREEMPTED, f"{sentence}. {AGAIN}", _peers.index), say=True)
    traceback.print_exception(error)
    _peers.stop(End(1, reason, _peers.index), say=False)


def stop(reason: str, code: int) -> None:
    """Ends this process, if there are other hosts, which stop too and print the reason; else returns."""
    if _peers is not None:
        _peers.stop(End(code, reason, _peers.index), say=False)


def ask_for_stacks(folder: epath.Path) -> None:
    """Makes every host write the stacks of all its Python threads to stderr and to `folder/host-<number>.txt`.

    The others answer within two seconds, also if their main threads hang. In a run of one process, it does alone.
    """
    if _peers is not None:
        _peers.ask_for_stacks(str(folder))
    else:
        dump_stacks(folder, 0)
