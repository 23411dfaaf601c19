"""Makes the tables of docs/reliability.md from the outcomes that the tests wrote: python tests/faults/report.py [FILE].

FILE is runs/faults/outcomes.jsonl by default. With --write they go into docs/reliability.md, else they are printed.
"""

import collections
import json
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).parents[2]
OUTCOMES, PAGE = ROOT / "runs" / "faults" / "outcomes.jsonl", ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def table(columns: list[str], rows: list[list]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def grouped(outcomes: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """The outcomes by the values of these fields, in order."""
    groups = collections.defaultdict(list)
    for outcome in outcomes:
        groups[tuple(outcome.get(name, "") for name in names)].append(outcome)
    return dict(sorted(groups.items(), key=lambda item: tuple(map(str, item[0]))))


def over(values: list[float], digits: int = 0) -> str:
    """The median and the largest."""
    return f"{statistics.median(values):.{digits}f} / {max(values):.{digits}f}" if values else "-"


def of_kills(outcomes: list[dict]) -> str:
    """Disturbances of processes: `wrong` is there if the run came to its end, and 0 if that was right."""
    rows = []
    for (signals, processes, hosts), group in grouped(outcomes, "signals", "processes", "hosts").items():
        moments = ", ".join(f"{moment} {len(found)}" for (moment,), found in grouped(group, "moment").items())
        survived = sum(outcome.get("wrong") == 0 for outcome in group)
        lost = [outcome["lost"] for outcome in group if "lost" in outcome]
        seconds = [outcome["seconds"] for outcome in group if "seconds" in outcome]
        wrong = sum(outcome.get("wrong", 0) > 0 for outcome in group)
        to = "it alone" if processes == 1 else f"{hosts} of {processes}"
        rows.append([signals, to, moments, f"{survived} of {len(group)}", over(lost), wrong, over(seconds, 1)])
    total = f"{sum(outcome.get('wrong') == 0 for outcome in outcomes)} of {len(outcomes)}"
    rows.append(["**all**", "", "", f"**{total}**", "", sum(outcome.get("wrong", 0) > 0 for outcome in outcomes), ""])
    columns = ["signals", "to", "during", "survived", "steps lost, median / most", "wrong results"]
    return table([*columns, "seconds until all had ended, median / most"], rows)


def of_surroundings(outcomes: list[dict]) -> str:
    """What happened around the run."""
    rows = []
    for (kind, fault, moment, direction), group in grouped(outcomes, "kind", "fault", "moment", "direction").items():
        what = f"{kind}, {fault or 'jumps ' + direction}" + (f", {moment}" if moment else "")
        survived = sum(outcome["survived"] for outcome in group)
        seconds = [outcome["seconds"] for outcome in group if "seconds" in outcome]
        wrong = sum(outcome.get("wrong", 0) > 0 for outcome in group)
        rows.append([what, f"{survived} of {len(group)}", wrong, over(seconds, 1)])
    return table(["fault", "survived", "wrong results", "seconds until it had ended, median / most"], rows)


def of_damages(outcomes: list[dict]) -> str:
    """What happened to files."""
    names = ("same", "older", "sentence", "wrong", "traceback")
    rows = []
    for (kind, how), group in grouped(outcomes, "kind", "how").items():
        counts = collections.Counter(outcome["outcome"] for outcome in group)
        rows.append([f"{kind}: {how}", len(group), *(counts[name] for name in names)])
    columns = ["damage", "cases", "no harm", "older checkpoint taken", "stopped in a sentence"]
    return table([*columns, "wrong results", "tracebacks"], rows)


def report(outcomes: list[dict]) -> str:
    """All tables."""
    of = grouped(outcomes, "kind")
    parts = (
        ("Processes", of_kills, ["kill"]),
        ("Around the run", of_surroundings, ["notice", "disk", "clock", "second start"]),
        ("Files", of_damages, ["checkpoint", "records"]),
    )
    tables = []
    for title, make, kinds in parts:
        found = [outcome for kind in kinds for outcome in of.get((kind,), [])]
        tables += [f"**{title}**\n\n{make(found)}"] if found else []
    return "\n\n".join(tables)


def main(*words: str) -> None:
    """The command."""
    files = [word for word in words if word != "--write"]
    text = pathlib.Path(files[0] if files else OUTCOMES).read_text()
    tables = report([json.loads(line) for line in text.splitlines()])
    if "--write" not in words:
        print(tables)
        return
    page = PAGE.read_text()
    before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    PAGE.write_text(f"{before}\n{tables}\n{after}")


if __name__ == "__main__":
    main(*sys.argv[1:])
