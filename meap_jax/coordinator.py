"""Runs jax's coordination service in a process of its own beside host 0, so that it outlives host 0 by a while.

Within host 0, as jax would have it, the service dies with it, and jax's client in every other process then aborts
with a C++ stack before anyone can say why. As a program, python -m meap_jax.coordinator, this file is that process;
host 0 starts it as python -P coordinator.py, so that it needs nothing but jaxlib. It reads the arguments of the
service as a line of JSON, answers "ready", and ends when it reads "quit", or `SECONDS_AFTER_HOST_0` after its
parent is gone, or at once then if it read "end with me".
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

SECONDS_AFTER_HOST_0 = 20.0  # That the service stays where host 0 is killed.
SECONDS_TO_OUTLIVE = 20.0  # That host 0, at the end of a run, waits for the other processes to end.


class Coordinator:
    """The process of the service; takes the place of jax's own service object, of which jax calls `shutdown` only."""

    def __init__(self) -> None:
        # A session of its own: Ctrl-C and a launcher's SIGTERM to the group of host 0 are not for this process.
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._process = subprocess.Popen([sys.executable, "-P", __file__], text=True, start_new_session=True, **pipes)
        self._hosts: list[socket.socket] = []

    def serve(self, *arguments: Any, **options: Any) -> "Coordinator":
        """Starts the service with the arguments of `_jax.get_distributed_runtime_service`; returns this object.

        Raises:
          RuntimeError: what the service says against them, such as a port that is in use.
        """
        assert self._process.stdin and self._process.stdout
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([arguments, options]) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline().strip()
        if answer != "ready":
            raise RuntimeError(answer or "the process of jax's coordination service ended")
        return self

    def outlive(self, hosts: Iterable[socket.socket]) -> None:
        """Has `shutdown` wait until the processes at the other ends of these connections have ended."""
        self._hosts = list(hosts)

    def end_with_this_process(self) -> None:
        """Lets the service end when this process does, since no other host needs it any more."""
        assert self._process.stdin
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write("end with me\n")
            self._process.stdin.flush()

    def shutdown(self) -> None:
        """Ends the service once the other hosts have ended; the client in this process must have left it.

        It is called when this process hears that all have left. Another may hear it later, and would abort if the
        service were gone by then.
        """
        limit = time.monotonic() + SECONDS_TO_OUTLIVE
        for host in self._hosts:
            with contextlib.suppress(OSError):
                host.settimeout(max(0.01, limit - time.monotonic()))
                while host.recv(2**16):
                    pass
        if self._process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                self._process.communicate("quit\n", timeout=5)
        if self._process.poll() is None:
            self._process.kill()


def main() -> None:
    """See the module."""
    for number in (signal.SIGTERM, signal.SIGINT):  # Some launchers send it to all processes of a job.
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    from jaxlib import _jax  # While host 0 waits for the others.

    arguments, options = json.loads(sys.stdin.readline())
    try:
        _service = _jax.get_distributed_runtime_service(*arguments, **options)
    except Exception as error:
        print(" ".join(str(error).split()), flush=True)
        return
    print("ready", flush=True)
    grace, end = SECONDS_AFTER_HOST_0, None
    while end is None or time.monotonic() < end:
        if end is None and select.select([sys.stdin], [], [], 0.2)[0]:
            word = sys.stdin.readline().strip()
            if word == "quit":
                break
            grace = 0 if word == "end with me" else grace
            end = None if word else time.monotonic() + grace
        elif end is not None:
            time.sleep(0.2)
        elif os.getppid() != parent:  # Processes that host 0 forked may hold the pipe open after its end.
            end = time.monotonic() + grace
    os._exit(0)  # Without the end of the service, which would wait for hosts.


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
    else:
        main()
