"""How time and memory of the train step grow with tokens a row, rows and layers.

python -m experiments.benchmarks.scaling [--repeats=N] [--quick] [--json=FILE]

All sizes of a table take turns in one run. Time is relative to the first row; the exponent p says that from the row
before to this one the figure grew as size^p. Memory is what the compiled step needs beside its arguments and results
(`memory_analysis().temp_size_in_bytes`): activations kept for the backward pass, and scratch.
"""

import argparse
from collections.abc import Mapping, Sequence

from experiments.benchmarks import harness
from experiments.benchmarks.timing import exponents, interleave, timed
from experiments.benchmarks.workload import Workload, config_of, temp_bytes

VALUES = {"T": (512, 1024, 2048, 4096, 8192), "B": (1, 2, 4, 8, 16), "layers": (1, 2, 4, 8, 16)}


def measure(args: argparse.Namespace) -> list[harness.Table]:
    """The tables of this benchmark."""
    size = "tiny" if args.quick else "1M"
    start = {"T": 32, "B": 1, "layers": 1} if args.quick else {"T": 512, "B": 1, "layers": 4}
    values = {"T": (32, 64), "B": (1, 2), "layers": (1, 2)} if args.quick else VALUES
    return [_table(axis, values[axis], size, start, args.repeats) for axis in values]


def _table(axis: str, values: Sequence[int], size: str, start: Mapping[str, int], repeats: int) -> harness.Table:
    """One axis in turns, the others as `start` says."""

    def workload(value: int) -> Workload:
        s = {**start, axis: value}
        return Workload(config_of(size, seq_len=s["T"], batch_size=s["B"], num_layers=s["layers"]))

    workloads = {str(value): workload(value) for value in values}
    timings = interleave({name: timed(w.step) for name, w in workloads.items()}, rounds=repeats)
    sizes = [float(value) for value in values]
    temp = [float(temp_bytes(w.program)) for w in workloads.values()]
    time_p = exponents(sizes, [timings.median(name) for name in workloads])
    temp_p = exponents(sizes, temp)
    rows = [
        {
            axis: value,
            "time, relative": timings.ratio(str(value), str(values[0])),
            "time p": time_p[i],
            "temp MiB": temp[i] / 2**20,
            "temp, relative": temp[i] / temp[0],
            "temp p": temp_p[i],
        }
        for i, value in enumerate(values)
    ]
    held = ", ".join(f"{name} = {value}" for name, value in start.items() if name != axis)
    return harness.Table(f"The train step as {axis} grows ({size} decoder, {held})", rows)


command = harness.main("scaling", __doc__, measure, repeats=5)

if __name__ == "__main__":
    harness.run(command)
