"""Several processes of one run, each of which takes itself for a host, on the loopback interface."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import tiny_runs

PROGRAM = """
import os, signal, sys, threading, time
from meap_jax import cli, peers
from meap_jax.errors import DataError
from etils import epath

def command(argv):
    import jax
    host = jax._src.distributed.global_state.process_id
    print("together", file=sys.stderr, flush=True)
    {body}

cli.run_command(command, joins_hosts=True)
"""
# The body's beginning where one host is to do what follows.
OTHERS_WAIT = "if host != {who}: threading.Event().wait()\ntime.sleep(1)\n"
# Never in what a host says: of jax's C++, of Gloo, of Python's own end.
NOISE = ("Check failure", "coordination_service", "preemption_sync", "terminate called", "Fatal Python", "Exception in")


class Hosts:
    """Processes that meet on a free port; each writes its stderr to a file, so that no pipe fills up.

    Used in a `with` statement, at whose end all of them are killed.
    """

    def __init__(self, commands, num_devices=1, **variables):
        self.began = time.monotonic()
        with socket.create_server(("127.0.0.1", 0)) as probe:  # A port that is free.
            self.address = "{}:{}".format(*probe.getsockname())
        self.count, self.num_devices, self.variables = len(commands), num_devices, variables
        self.processes, self.files = {}, {}
        for index, command in enumerate(commands):
            if command is not None:  # Else `start` does it, later.
                self.start(index, command)

    def start(self, index, command, *, folder=tiny_runs.ROOT, cwd=None, **variables):
        """Starts one host, with the package of this folder; `index` may be a word if JAX_PROCESS_ID is given."""
        cluster = {"JAX_COORDINATOR_ADDRESS": self.address, "JAX_NUM_PROCESSES": str(self.count)}
        own = {"JAX_PROCESS_ID": str(index), "PYTHONPATH": str(folder), "MEAP_JAX_HOST_TIMEOUT_SECONDS": "15"}
        names = cluster | own | self.variables | variables
        environment = tiny_runs.environment(**names)
        environment["XLA_FLAGS"] = environment["XLA_FLAGS"].replace(
            "device_count=1", f"device_count={self.num_devices}"
        )
        self.files[index] = tempfile.TemporaryFile("w+")
        pipes = dict(stdout=subprocess.DEVNULL, stderr=self.files[index], stdin=subprocess.DEVNULL)
        self.processes[index] = subprocess.Popen(command, env=environment, cwd=cwd or folder, **pipes)

    def said(self, index):
        """What a host wrote to stderr so far."""
        # Of the same open file: its position is the writer's too, so it is read without being moved.
        file = self.files[index].fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    def wait_for(self, index, words, timeout=180):
        """Waits until a host has said these words."""
        limit = time.monotonic() + timeout
        while words not in self.said(index):
            assert time.monotonic() < limit and self.processes[index].poll() is None, self.everything()
            time.sleep(0.05)

    def send(self, index, number):
        """Sends a signal to a host."""
        self.processes[index].send_signal(number)

    def codes(self, timeout=240, but=()):
        """Waits until all have ended, `but` those that can't; returns the exit codes of the others."""
        limit = time.monotonic() + timeout
        waited = [process for index, process in self.processes.items() if index not in but]
        for process in waited:
            try:
                process.wait(max(0.1, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running after {timeout} s\n{self.everything()}") from None
        return [process.returncode for process in waited]

    def everything(self):
        """What all hosts said."""
        return "\n".join(f"===== host {index}\n{self.said(index)}" for index in self.files)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
        for file in self.files.values():
            file.close()


def programs(body, count=3, **variables):
    """So many processes whose command has this body, in which `host` is the number of each."""
    program = PROGRAM.format(body=body.replace("\n", "\n    "))
    return Hosts([[sys.executable, "-c", program]] * count, **variables)


def assert_says(group, host, *sentences, traceback=False):
    """That a host's errors are these alone, each one line, and nothing else of what must not be there."""
    said = group.said(host)
    assert [line for line in said.splitlines() if line.startswith("error")] == list(sentences), group.everything()
    assert ("Traceback" in said) == traceback and not any(word in said for word in NOISE), group.everything()
