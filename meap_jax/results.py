"""What every evaluator returns: metrics with intervals, and a record for each example."""

from typing import Any, NamedTuple


class Interval(NamedTuple):
    """An estimate and its two-sided confidence interval, whose ends are None where one example has no spread."""

    estimate: float
    low: float | None
    high: float | None


class Result(NamedTuple):
    """The results of one evaluator on one model."""

    metrics: dict[str, Interval]
    examples: list[dict[str, Any]]  # One record an example, of JSON's types; all with the same keys.
