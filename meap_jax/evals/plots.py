"""Pictures of metrics: heat maps over lengths and depths, curves over lengths and positions, with intervals."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  After the backend is chosen.

_CELL = re.compile(r"(.+)/length_(\d+)/depth_(\d+)")
_POINT = re.compile(r"(.+)/(length|position|needles)_(\d+)")
_LABELS = {"length": "tokens", "position": "position of what is asked for", "needles": "needles"}
COLORS = ("#1f77b4", "#d95f02")

Metrics = Mapping[str, Mapping[str, float | None]]  # {evaluator/metric: interval}.


def write(folder: Path, models: Mapping[str, Metrics]) -> list[Path]:
    """Draws what the metrics of one or two models have of grids and curves, a file each; returns the files.

    Args:
      folder: takes them.
      models: {its name: its metrics}; two share a curve, and of their heat maps a third is the difference.
    """
    grids: dict[str, dict[str, dict[tuple[int, int], float]]] = defaultdict(lambda: defaultdict(dict))
    curves: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for model, metrics in models.items():
        for name, interval in metrics.items():
            if cell := _CELL.fullmatch(name):
                grids[cell[1]][model][int(cell[2]), int(cell[3])] = float(interval["estimate"] or 0)
            elif point := _POINT.fullmatch(name):
                curves[f"{point[1]}/{point[2]}"][model][int(point[3])] = interval
    if grids or curves:
        folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name.replace('/', '_')}.png" for name in (*grids, *curves)}
    for name, cells in grids.items():
        _heat_map(files[name], name, cells)
    for name, points in curves.items():
        _curve(files[name], name, points)
    return list(files.values())


def _heat_map(file: Path, name: str, models: Mapping[str, Mapping[tuple[int, int], float]]) -> None:
    """A panel a model, and with two models one of their difference."""
    panels: list[tuple[str, Mapping[tuple[int, int], float]]] = list(models.items())
    if len(panels) == 2:
        (a, of_a), (b, of_b) = panels
        panels.append((f"{b} - {a}", {cell: of_b[cell] - of_a[cell] for cell in of_a.keys() & of_b.keys()}))
    figure, axes = plt.subplots(1, len(panels), figsize=(1.5 + 5.5 * len(panels), 4.5), squeeze=False)
    for axis, (title, cells) in zip(axes[0], panels, strict=True):
        lengths, depths = (sorted({cell[i] for cell in cells}) for i in (0, 1))
        grid = np.array([[cells.get((length, depth), np.nan) for length in lengths] for depth in depths])
        is_difference = axis is axes[0][-1] and len(models) == 2
        low, cmap = (-1, "PuOr") if is_difference else (0, "RdYlGn")
        image = axis.imshow(grid, aspect="auto", cmap=cmap, vmin=low, vmax=1)
        for (row, column), value in np.ndenumerate(grid):
            is_dark = abs(value) > 0.7 if is_difference else not 0.15 < value < 0.85
            color = "white" if is_dark else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45)
        axis.set_yticks(range(len(depths)), [str(depth) for depth in depths])
        axis.set(xlabel="tokens", ylabel="depth, %")
        axis.set_title(title, fontsize=10)
        figure.colorbar(image, ax=axis)
    figure.suptitle(name, fontsize=11)
    _save(figure, file)


def _curve(file: Path, name: str, models: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> None:
    """A line a model, with the interval of each point."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for (model, points), color in zip(models.items(), COLORS, strict=False):
        xs = sorted(points)
        estimates = np.array([points[x]["estimate"] for x in xs], float)
        ends = np.array([[points[x][end] for x in xs] for end in ("low", "high")], float)  # None becomes nan.
        errors = np.abs(np.where(np.isnan(ends), estimates, ends) - estimates)
        axis.errorbar(xs, estimates, errors, label=model, color=color, marker="o", markersize=4, capsize=3)
    kind = name.rpartition("/")[2]
    axis.set(xlabel=_LABELS[kind], ylabel=name.rpartition("/")[0], ylim=(-0.03, 1.03))
    axis.set_xticks(xs)
    axis.tick_params(axis="x", rotation=45 if kind == "length" else 0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def names_of(files: Sequence[Path]) -> list[str]:
    """Two short names for files of results, which differ."""
    names = [file.stem for file in files]
    return names if len(set(names)) == len(names) else [f"{file.parent.name}/{file.stem}" for file in files]
