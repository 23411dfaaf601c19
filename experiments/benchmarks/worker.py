"""An engine of a benchmark in a process of its own: python -m experiments.benchmarks.worker MODULE SPEC.

The process does what each line on stdin asks for, and answers with a line of JSON. MODULE has `build`, which makes an
engine of SPEC, an object in JSON. The benchmarks start it; nobody need type this.

Engines that are compared live in such processes and take turns, so that neither holds threads, memory or an allocator
of the other. All inherit the parent's CPU affinity and environment.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

# What an engine says when its device has no room: JAX, JAX or torch on a GPU, torch on a CPU.
_OUT_OF_MEMORY = ("resource_exhausted", "out of memory", "can't allocate memory")


class WorkerError(RuntimeError):
    """A worker that failed, with what it said last."""


class OutOfMemory(WorkerError):
    """Its device had no room."""


class Worker:
    """The parent's end. Use as a context manager: the process ends with the block."""

    def __init__(self, module: str, spec: Mapping[str, Any]):
        """Starts an engine and waits until it is ready.

        Args:
          module: whose `build` makes it.
          spec: what `build` is given.

        Raises:
          WorkerError, OutOfMemory: if it doesn't come to that.
        """
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, module, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about: dict[str, Any] = self._answer()

    def ask(self, name: str, *args: Any) -> Any:
        """Sends a command and waits for its answer.

        Raises:
          WorkerError, OutOfMemory: if it fails.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *args]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{self._module} ended with exit code {self._process.wait()}; what it said is above.")
        answer = json.loads(line)
        if "error" in answer:
            kind = OutOfMemory if any(word in answer["error"].lower() for word in _OUT_OF_MEMORY) else WorkerError
            raise kind(f"{self._module}: {answer['error']}")
        return answer["value"]

    def close(self) -> None:
        """Ends the process: it stops when its stdin does."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(module: str, spec: dict[str, Any]) -> None:
    """The worker's end: answers until stdin ends.

    Args:
      module: whose `build` is a function (spec) -> (what to say when ready, commands by name).
      spec: of the engine.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print is for people.

    def answered(function: Callable, *args: Any) -> Any:
        try:
            value = function(*args)
        except Exception as error:  # Engines raise many kinds; the parent decides what it means.
            print(json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}), file=answers)
            answers.flush()
            sys.exit(1)
        return value

    def say(value: Any) -> None:
        print(json.dumps({"value": value}), file=answers, flush=True)

    about, commands = answered(lambda: importlib.import_module(module).build(spec))
    say(about)
    for line in sys.stdin:
        name, *args = json.loads(line)
        say(answered(commands[name], *args))


def command(argv: list[str]) -> None:
    """Runs the worker's end of the engine that is named."""
    if {"-h", "--help"} & {*argv[1:]} or len(argv) != 3:
        print(__doc__)
        sys.exit(0 if len(argv) == 2 else 2)
    serve(argv[1], json.loads(argv[2]))


if __name__ == "__main__":
    command(sys.argv)
