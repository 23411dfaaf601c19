"""What the commands of this folder share: flags, the line that says what they ran on, tables out."""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from experiments.benchmarks.timing import Ratio
from meap_jax import cli
from meap_jax.errors import ConfigError


class Table(NamedTuple):
    """One table: what it measures, and a dict a row, all with the same columns."""

    title: str
    rows: list[dict[str, Any]]  # Column -> text, number, Ratio, or None where there is no figure.
    note: str = ""

    def markdown(self) -> str:
        """As in docs/performance.md; a ratio is its median, with the quartiles in parentheses."""
        columns = list(self.rows[0])
        lines = [f"**{self.title}**", "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
        lines += [f"| {' | '.join(cell(row[column]) for column in columns)} |" for row in self.rows]
        return "\n".join(lines + (["", self.note] if self.note else []))


def cell(value: Any) -> str:
    """A figure as text."""
    if isinstance(value, Ratio):
        # One digit more near 1, where the question is how far from it.
        digits = 3 if 0.9 < value.median < 1.1 else 2
        return " ".join(
            (_number(value.median, digits), f"({_number(value.low, digits)}, {_number(value.high, digits)})")
        )
    if isinstance(value, float):
        return _number(value, 2)
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _number(value: float, digits: int) -> str:
    """A number of at least 0.1 with `digits` places, a smaller one with two significant digits, a large one whole."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.1:
        digits = 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{digits}f}"


def setting() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} cores of {_processor()}",
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "unset"),
    }


def _processor() -> str:
    """The name of the CPU, as Linux knows it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


class _Parser(argparse.ArgumentParser):
    """Raises mistakes on the command line as a ConfigError, as our other commands do."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags.")


def main(
    name: str,
    description: str | None,
    measure: Callable[[argparse.Namespace], list[Table]],
    *,
    repeats: int,
    add_flags: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> Callable[[list[str]], None]:
    """Makes the command of a benchmark, for `cli.run_command`.

    Args:
      name: of the module, as in `python -m experiments.benchmarks.NAME`.
      description: its docstring.
      measure: (flags) -> tables; `flags.repeats` is how many rounds count, `flags.quick` asks for sizes of a test.
      repeats: default of `--repeats`; with `--quick` it is 2.
      add_flags: adds the benchmark's own.
    """

    def command(argv: list[str]) -> None:
        parser = _Parser(
            prog=f"python -m experiments.benchmarks.{name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("--repeats", type=int, help=f"rounds that count (default {repeats}; 2 with --quick)")
        parser.add_argument("--quick", action="store_true", help="tiny sizes: shows in seconds that all of it runs")
        parser.add_argument("--json", metavar="FILE", help="write settings and figures there too")
        add_flags(parser)
        args = parser.parse_args(argv[1:])
        if args.repeats is None:
            args.repeats = 2 if args.quick else repeats
        if args.repeats < 1:
            raise ConfigError(f"--repeats is {args.repeats}, but must be a number from 1 on.")
        file = None if args.json is None else _json_file(args.json)

        where = setting()  # Before: the load that was there without us.
        tables = measure(args)
        print(f"{', '.join(f'{key} {value}' for key, value in where.items())}; medians of {args.repeats} rounds "
              "(quartiles in parentheses)\n")  # fmt: skip
        print("\n\n".join(table.markdown() for table in tables) + "\n", flush=True)
        if file is not None:
            record = {"benchmark": name, "setting": where, "repeats": args.repeats, "quick": args.quick}
            record["tables"] = [table._asdict() | {"rows": [_plain(row) for row in table.rows]} for table in tables]
            file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    return command


def run(command: Callable[[list[str]], None]) -> None:
    """Runs the command on sys.argv."""
    cli.run_command(command)


def _json_file(name: str) -> pathlib.Path:
    """The file that --json names; found out before an hour of measuring, not after it."""
    file = pathlib.Path(name).expanduser()
    if not file.parent.is_dir() or file.is_dir():
        raise ConfigError(f"--json is {name}, but must be a file in a folder that is there.")
    return file


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON knows it."""

    def plain(value: Any) -> Any:
        if isinstance(value, Ratio):
            return value._asdict()
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {column: plain(value) for column, value in row.items()}
