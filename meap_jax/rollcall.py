"""Waits until all processes of a run are there and says whom it waits for, before jax connects them.

jax's own wait ends in an abort with a C++ stack, says nothing meanwhile, and a process that comes too late is told
nothing. Host 0 listens on the coordinator's port, the others connect to it, each sends one line of JSON, and host 0
answers in lines of JSON. The connections stay open for the whole run: one that closes shows that a process is gone.
"""

import contextlib
import errno
import json
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from meap_jax.errors import ConfigError

GREETING = "meap_jax roll call 1"
SECONDS_BETWEEN_WORDS = 30.0
# How long a port may be somebody else's: the coordination service of a run whose host 0 was killed outlives it a while.
SECONDS_FOR_AN_OLD_RUN = 45.0
_MOST_BYTES = 2**20  # Of a line.
_POLL_SECONDS = 0.5

Facts = Mapping[str, str]
Say = Callable[[str], None]


def differences(facts: Mapping[int, Facts]) -> str:
    """One sentence on how hosts differ from the first of them in facts that all must share; "" if they don't.

    Args:
      facts: of each host, {name: value}.
    """
    first, *others = sorted(facts)
    found = []
    for host in others:
        for name in sorted({*facts[first], *facts[host]}):
            theirs, ours = (facts[i].get(name, "nothing") for i in (host, first))
            if theirs != ours:
                found.append(f"host {host} has {name}={theirs} and host {first} {ours}")
    if not found:
        return ""
    more = f"; and {len(found) - 4} differences more" if len(found) > 4 else ""
    return "; ".join(found[:4]) + more


def split_address(address: str) -> tuple[str, int]:
    """The host and the port of `host:port`, where an IPv6 address may stand in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def listed(hosts: Iterable[int]) -> str:
    """Names hosts in a sentence: "host 1" or "hosts 1, 3"; beyond eight, how many more."""
    numbers = sorted(hosts)
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"host{'s' if len(numbers) > 1 else ''} {shown}"


def send(connection: socket.socket, **message: Any) -> None:
    """Sends one line of JSON; a peer that is gone is passed over."""
    with contextlib.suppress(OSError):
        connection.sendall((json.dumps({"from": GREETING, **message}) + "\n").encode())


def call(bind: str, address: str, count: int, facts: Facts, timeout: float, say: Say) -> dict[int, socket.socket]:
    """Host 0's part: waits until hosts 1 to `count - 1` are there with the same facts.

    Args:
      bind: host:port to listen on.
      address: the same, as the other hosts name it.
      count: of processes.
      facts: that all must share.
      timeout: in seconds.
      say: is told every 30 s who is missing.

    Returns:
      The connection to each other host, which waits for the line `send(connection, go=True)`.

    Raises:
      ConfigError: for hosts that didn't come, came twice, or have other facts; those that came are told the same.
    """
    listener = _listen(bind, address, say)
    came = _Came(facts)
    began = word = time.monotonic()
    with contextlib.closing(listener), selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while not came.complete(count):
            for key, _ in selector.select(_POLL_SECONDS):
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    connection.setblocking(False)
                    selector.register(connection, selectors.EVENT_READ)
                    came.lines[connection] = b""
                elif isinstance(key.fileobj, socket.socket) and not came.hear(key.fileobj):
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
            now, missing = time.monotonic(), set(range(1, count)) - set(came.hosts)
            if came.twice is not None:
                problem = (
                    f"two processes say that they are host {came.twice}: give each its own JAX_PROCESS_ID, from 0 to "
                    f"{count - 1}."
                )
                return _stop(came, problem)
            if now - began > timeout:
                problem = (
                    f"{listed(missing)} of {count} did not come to {address} within {timeout:g} s: start all of them "
                    "with the same JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES."
                )
                return _stop(came, problem)
            if missing and now - word > SECONDS_BETWEEN_WORDS:
                word, words = now, f"{listed(missing)} of {count}, for {now - began:.0f} s now, at {address}"
                say(f"waiting for {words}")
                for connection in came.lines:
                    send(connection, waiting=words)
    problem = differences(came.facts)
    if problem:
        return _stop(came, f"{problem}: all hosts must run the same.")
    for connection in came.hosts.values():
        connection.setblocking(True)
    return came.hosts


def answer(address: str, index: int, facts: Facts, timeout: float, say: Say) -> socket.socket:
    """The part of a host other than the first: connects to host 0 and waits until all are there.

    Args:
      address: host:port of host 0.
      index: of this host.
      facts: that all must share.
      timeout: in seconds.
      say: is told every 30 s whom this host waits for.

    Returns:
      The connection, once host 0 says that jax can connect.

    Raises:
      ConfigError: what host 0 says against this run, or that it does not answer.
    """
    began = word = time.monotonic()
    stranger: float | None = None
    while True:
        now = time.monotonic()
        if stranger is not None and now - stranger > min(SECONDS_FOR_AN_OLD_RUN, timeout):
            raise ConfigError(
                f"a run is going on already at {address}, and host {index} comes too late for it: stop all of its "
                "hosts and start them together, or name another port in JAX_COORDINATOR_ADDRESS."
            )
        if now - began > timeout:
            raise ConfigError(
                f"host 0 did not answer host {index} at {address} within {timeout:g} s: has it been started, or has "
                "its run ended already? Start all hosts together, with the address of host 0."
            )
        if now - word > SECONDS_BETWEEN_WORDS:
            word = now
            say(f"waiting for host 0 at {address}, for {now - began:.0f} s now")
        try:
            connection = socket.create_connection(split_address(address), timeout=5)
        except OSError:  # Not there yet, or its name isn't known yet.
            time.sleep(_POLL_SECONDS)
            continue
        try:
            send(connection, host=index, facts=dict(facts))
            while (message := _read(connection, timeout + SECONDS_BETWEEN_WORDS)) is not None:
                if "stop" in message:
                    raise ConfigError(message["stop"])
                if "go" in message:
                    return connection
                say(f"waiting for {message['waiting']}")
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            stranger = stranger or now  # Another program, such as the service of a run that is going on.
        except OSError:
            pass  # Host 0 was started again, or has just given up.
        connection.close()
        time.sleep(_POLL_SECONDS)


class _Came:
    """The hosts that came to the first, by what their connections said."""

    def __init__(self, facts: Facts):
        self.lines: dict[socket.socket, bytes] = {}  # What each open connection sent.
        self.hosts: dict[int, socket.socket] = {}
        self.facts: dict[int, Facts] = {0: facts}
        self.twice: int | None = None

    def complete(self, count: int) -> bool:
        """Whether all hosts are here; those of a higher number differ in their count, which is a fact."""
        return set(range(1, count)) <= set(self.hosts)

    def hear(self, connection: socket.socket) -> bool:
        """Takes in what a connection sent; False if it closed or is no host's."""
        try:
            more = connection.recv(2**16)
        except BlockingIOError:
            return True
        except OSError:
            more = b""
        self.lines[connection] += more
        known = next((host for host, its in self.hosts.items() if its is connection), None)
        if not more or len(self.lines[connection]) > _MOST_BYTES:
            del self.lines[connection]
            if known is not None:
                del self.hosts[known], self.facts[known]
            return False
        if known is None and b"\n" in self.lines[connection]:
            message = _parsed(self.lines[connection]) or {}
            host, facts = message.get("host"), message.get("facts")
            if not isinstance(host, int) or not isinstance(facts, dict):
                del self.lines[connection]
                return False
            if host in self.facts:
                self.twice = host
            self.hosts[host], self.facts[host] = connection, facts
        return True


def _stop(came: _Came, problem: str) -> dict[int, socket.socket]:
    for connection in came.lines:
        send(connection, stop=problem)
        connection.close()
    raise ConfigError(problem)


def _listen(bind: str, address: str, say: Say) -> socket.socket:
    host, port = split_address(bind)
    began, told = time.monotonic(), False
    while True:
        try:
            if host in ("", "::") and socket.has_dualstack_ipv6():
                return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server(("" if host == "::" else host, port), family=family, backlog=1024)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"host 0 can't listen on {bind}: {error.strerror or error}.") from error
            if time.monotonic() - began > SECONDS_FOR_AN_OLD_RUN:
                raise ConfigError(
                    f"the port of {address} is in use on host 0: another run is going on there. Stop it, or name "
                    "another port in JAX_COORDINATOR_ADDRESS."
                ) from error
        if not told:
            say(f"waiting for the port of {address}, which another program uses, such as a run that has just ended")
            told = True
        time.sleep(_POLL_SECONDS)


def _read(connection: socket.socket, timeout: float) -> dict[str, Any] | None:
    """The next message; None if the connection was closed. Raises ValueError for what is none."""
    connection.settimeout(timeout)
    line = b""
    while not line.endswith(b"\n"):  # Byte by byte: what follows is not ours to take.
        byte = connection.recv(1)
        if not byte and not line:
            return None
        line += byte
        if not byte or not (GREETING.encode() in line or len(line) < 64):
            raise ValueError("no answer of host 0")
    message = _parsed(line)
    if message is None:
        raise ValueError("no answer of host 0")
    return message


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The message of a line; None if it isn't one of ours."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) and message.get("from") == GREETING else None
