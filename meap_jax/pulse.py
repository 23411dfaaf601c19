"""Judges by their beats which hosts of a run are gone; opens nothing and waits for nothing."""

from collections.abc import Mapping, Set

from meap_jax.rollcall import listed

SECONDS_IF_CLOSED = 3.0  # Without beats, for a host whose connection was closed.
SECONDS_OF_A_STALL = 5.0  # A pause of this process itself, after which it must not judge others by their silence.


class Pulse:
    """When each host was last heard of; times are in seconds on one clock, that of `time.monotonic`."""

    def __init__(self, hosts: Set[int], timeout: float, now: float):
        self._timeout = timeout
        self._heard: dict[int, tuple[str, float]] = dict.fromkeys(hosts, ("", now))
        self._round = self._judged = now
        self._closed: dict[int, float] = {}  # Hosts whose connections were closed, and when.

    def close(self, host: int, now: float) -> None:
        """Takes in that the connection of a host was closed, as when it is killed."""
        self._closed[host] = now

    def hear(self, beats: Mapping[int, str], now: float) -> None:
        """Takes in what the hosts' keys say; a host lives if its own has changed."""
        self._round = now
        for host, beat in beats.items():
            if host in self._heard and self._heard[host][0] != beat:
                self._heard[host] = (beat, now)
                if now - self._closed.get(host, now) > SECONDS_IF_CLOSED:
                    del self._closed[host]  # It lives: something between has closed an idle connection.

    def lost(self, ended: Set[int], now: float) -> tuple[list[int], str]:
        """The hosts that are gone without a word, and one sentence on them; ([], "") if there are none."""
        if now - self._judged > SECONDS_OF_A_STALL:  # This process was stopped, and heard nobody.
            self._heard = {host: (beat, now) for host, (beat, _) in self._heard.items()}
            self._round = now
        self._judged = now
        silent = {host: now - since for host, (_, since) in self._heard.items() if host not in ended}
        killed = [host for host in sorted(self._closed.keys() & silent.keys()) if silent[host] > SECONDS_IF_CLOSED]
        if killed:
            return killed, f"{listed(killed)} ended without a word, as if killed; its log or its machine's may say why"
        if now - self._round > self._timeout:
            seconds = now - self._round
            return [0], f"host 0 can't be reached since {seconds:.0f} s; its machine or the network may be down"
        hung = [host for host, seconds in silent.items() if seconds > self._timeout]
        if hung:
            seconds = max(silent[host] for host in hung)
            return hung, f"{listed(hung)} gave no sign of life for {seconds:.0f} s; it hangs, or its machine is down"
        return [], ""
