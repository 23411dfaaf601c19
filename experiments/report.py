"""The page that compares NTP and MEAP: results.json, report.md and two plots."""

import json
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from meap_jax.results import Interval
from meap_jax.statistics import binomial_interval, paired_t_interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  After the backend is chosen.

COLORS = {"ntp": "#1f77b4", "meap": "#d95f02"}
LABELS = {"ntp": "NTP", "meap": "MEAP"}
DEPTH_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class RunResult(NamedTuple):
    """What one run left behind."""

    objective: str
    seed: int
    metrics: list[dict[str, float]]  # Records of metrics.jsonl.
    evaluation: dict[str, Any]  # From `meap_jax.evaluate`, on test.


def write(folder: epath.Path, runs: list[RunResult], setting: dict[str, Any]) -> dict[str, Any]:
    """Writes results.json, loss.png, depth.png and report.md; returns the results.

    Args:
      folder: where they go.
      runs: NTP and MEAP for every seed.
      setting: config, data counts, versions and minutes (None if it was interrupted), for the record.
    """
    results = summarize(runs) | {"setting": setting}
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    _plot_losses(folder / "loss.png", runs)
    _plot_depth(folder / "depth.png", results)
    (folder / "report.md").write_text(_markdown(results))
    return results


# ------------------------------------------------------------------------------------------------------------- numbers


def summarize(runs: list[RunResult]) -> dict[str, Any]:
    """Means, spreads and paired differences of every test metric, and retrieval by depth and by distance.

    Two spreads, never mixed: over seeds (a pair of runs is the unit), and over the answers of one run (binomial).
    """
    seeds = sorted({run.seed for run in runs})
    of = {(run.objective, run.seed): run.evaluation for run in runs}
    metrics = [name for name in runs[0].evaluation["metrics"] if not name.endswith("/chance")]  # Of the questions.

    def compared(name: str) -> dict[str, Any]:
        per_seed = {o: [of[o, seed]["metrics"][name]["estimate"] for seed in seeds] for o in LABELS}
        differences = np.subtract(per_seed["meap"], per_seed["ntp"])
        return {
            **per_seed,
            "mean": {o: float(np.mean(v)) for o, v in per_seed.items()},
            "sd": {o: float(np.std(v, ddof=1)) for o, v in per_seed.items()},
            "difference": paired_t_interval(differences)._asdict(),
        }

    results: dict[str, Any] = {
        "seeds": seeds,
        "metrics": {name: compared(name) for name in metrics},
    }
    for name, examples in runs[0].evaluation["examples"].items():
        if "depth" not in examples[0]:
            continue
        groups = {"depth": DEPTH_EDGES, "distance": _quantile_edges(_column(examples, "distance"))}
        intervals = {run: evaluation["metrics"][f"{name}/accuracy"] for run, evaluation in of.items()}
        results[name] = {
            "trials_per_run": len(examples),
            "within_run": {o: [[intervals[o, seed][end] for end in ("low", "high")] for seed in seeds] for o in LABELS},
            **{by: _by(of, seeds, name, by, edges) for by, edges in groups.items()},
        }
    return results


def _column(examples: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([example[key] for example in examples])


def _quantile_edges(values: np.ndarray, groups: int = 5) -> tuple[float, ...]:
    return tuple(np.unique(np.quantile(values, np.linspace(0, 1, groups + 1)).round()))


def _by(of: dict, seeds: list[int], name: str, by: str, edges: tuple[float, ...]) -> list[dict[str, Any]]:
    """Accuracy in each group [low, high) that has answers (the last one closed), run by run."""
    rows = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        where = _column(of["ntp", seeds[0]]["examples"][name], by)  # All runs answer the same questions.
        inside = (where >= low) & ((where < high) | (high == edges[-1]))
        if not inside.any():
            continue
        row: dict[str, Any] = {"low": low, "high": high, "trials_per_run": int(inside.sum())}
        for objective in LABELS:
            hits = [int(_column(of[objective, seed]["examples"][name], "correct")[inside].sum()) for seed in seeds]
            intervals = [binomial_interval(h, row["trials_per_run"]) for h in hits]
            shares = [interval.estimate for interval in intervals]
            row[objective] = {
                "per_seed": shares,
                "within_run": [interval[1:] for interval in intervals],
                "mean": float(np.mean(shares)),
                "sd": float(np.std(shares, ddof=1)),
            }
        row["difference"] = paired_t_interval(np.subtract(row["meap"]["per_seed"], row["ntp"]["per_seed"]))._asdict()
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------------------- plots


def _plot_losses(file: epath.Path, runs: list[RunResult]) -> None:
    names = sorted({name for run in runs for record in run.metrics for name in record if name.endswith("/loss")})
    figure, axes = plt.subplots(1, 1 + len(names), figsize=(5 * (1 + len(names)), 4), squeeze=False)
    for panel, name in zip(axes[0], ["loss", *names], strict=True):
        for run in runs:
            points = np.array([(r["step"], r[name]) for r in run.metrics if name in r and r["step"] > 1])
            if name == "loss":
                points = _smoothed(points)
            panel.plot(points[:, 0], points[:, 1], color=COLORS[run.objective], alpha=0.8, linewidth=1.2)
        panel.set_xlabel("step")
        source = name.removeprefix("validation_").removesuffix("/loss")
        title = "training (MEAP: masked inputs)" if name == "loss" else f"held-out {source}, clean inputs"
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("cross-entropy, nats a token")
    _legend(axes[0][-1])
    _save(figure, file)


def _smoothed(points: np.ndarray, width: int = 9) -> np.ndarray:
    if len(points) <= width:
        return points
    kernel = np.ones(width) / width
    return np.stack([np.convolve(points[:, i], kernel, "valid") for i in range(2)], axis=1)


def _plot_depth(file: epath.Path, results: dict[str, Any]) -> None:
    tables = [value for value in results.values() if isinstance(value, dict) and "depth" in value]
    if not tables:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for panel, (by, label) in zip(
        axes,
        (("depth", "depth of the fact (0 first, 1 last)"), ("distance", "tokens from fact to answer")),
        strict=True,
    ):
        rows = tables[0][by]
        x = np.arange(len(rows))
        for shift, objective in ((-0.06, "ntp"), (0.06, "meap")):
            shares = np.array([row[objective]["per_seed"] for row in rows])  # [groups, seeds]
            mean = 100 * shares.mean(axis=1)
            panel.plot(x + shift, mean, color=COLORS[objective], marker="_", markersize=14, linewidth=1.2)
            for seed in shares.T:
                panel.plot(x + shift, 100 * seed, "o", color=COLORS[objective], markersize=4, alpha=0.6)
        panel.set_xticks(x, [_group(row) for row in rows], fontsize=9)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("answers exactly right, %")
    axes[0].set_title("one dot a seed, bars and lines: means", fontsize=10)
    _legend(axes[1])
    _save(figure, file)


def _legend(panel: Axes) -> None:
    panel.legend(handles=[Line2D([], [], color=COLORS[o], label=LABELS[o]) for o in LABELS], frameon=False)


def _save(figure: Figure, file: epath.Path) -> None:
    figure.tight_layout()
    with file.open("wb") as stream:
        figure.savefig(stream, dpi=110, format="png")
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------- page


def _markdown(results: dict[str, Any]) -> str:
    setting, seeds = results["setting"], results["seeds"]
    config = setting["config"]
    model, objective = config["model"], config["objective"]
    tokens = config["num_steps"] * config["global_batch_size"] * config["seq_len"]
    lines = [
        "# NTP and MEAP, side by side",
        "",
        "Next-token prediction (NTP) against mask-enhanced autoregressive prediction "
        f"(MEAP, {objective['mask_ratio']:.0%} of the input tokens masked). "
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}); the two runs of a seed share initial weights, batches, "
        "steps and learning rate, and differ in the objective alone.",
        "",
        f"Decoder: {model['num_layers']} layers, width {model['embed_dim']}, {model['num_heads']} heads, "
        f"vocabulary {model['vocab_size']}, {model['dtype']}. "
        f"Each run: {config['num_steps']:,} steps of {config['global_batch_size']} x {config['seq_len']} tokens "
        f"({tokens / 1e6:.1f}M), peak learning rate {config['optimizer']['learning_rate']:g}, "
        f"data {config['data']['mixture']}.",
        "",
        "## On held-out test data",
        "",
        "| | NTP | MEAP | MEAP - NTP, 95 % interval over seeds |",
        "| --- | --- | --- | --- |",
    ]
    verdicts = []
    for name, row in results["metrics"].items():
        percent = name.endswith("/accuracy")
        shown = [f"{_number(row['mean'][o], percent)} ± {_number(row['sd'][o], percent)}" for o in LABELS]
        lines.append(f"| {_title(name)} | {shown[0]} | {shown[1]} | {_interval(row['difference'], percent)} |")
        verdicts.append(f"- {_title(name)}: {_verdict(Interval(**row['difference']), higher_is_better=percent)}")
    lines += [
        "",
        "Mean ± standard deviation over seeds; losses in nats a token on clean inputs unless marked masked. "
        f"The interval is Student's t on the {len(seeds)} paired differences.",
        "",
        *verdicts,
        "",
        "## Seed by seed",
        "",
        "| | " + " | ".join(f"seed {seed}: NTP, MEAP" for seed in seeds) + " |",
        "| --- |" + " --- |" * len(seeds),
    ]
    for name, row in results["metrics"].items():
        percent = name.endswith("/accuracy")
        pairs = [f"{_number(a, percent)}, {_number(b, percent)}" for a, b in zip(row["ntp"], row["meap"], strict=True)]
        lines.append(f"| {_title(name)} | " + " | ".join(pairs) + " |")
    lines += ["", "![losses](loss.png)", ""]
    for table in results.values():
        if isinstance(table, dict) and "depth" in table:
            lines += _retrieval_section(table, seeds, config)
    counts = "; ".join(
        f"{source}: {splits['train']['blocks']:,} training blocks, {splits['test']['blocks']:,} test blocks"
        for source, splits in setting["data"].items()
    )
    lines += [
        "## How it was made",
        "",
        f"- Data {setting['fingerprint'][:12]}: {counts}.",
        "- "
        + ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
        + f"; {setting['cores']} cores.",
        *([f"- {setting['minutes']} minutes from the first run's start to this page."] if setting["minutes"] else []),
        "- Everything above is in results.json; each run's own log in its folder.",
        "",
        "A model and a budget of this size say whether the code works, not whether the paper is right.",
        "",
    ]
    return "\n".join(lines)


def _task(config: dict[str, Any]) -> str:
    retrieval = config["data"]["retrieval"]
    num_facts = retrieval["num_eval_facts"]
    return (
        f"Training documents state {retrieval['min_facts']} to {retrieval['num_facts']} facts and may ask one again; "
        f"test documents state {num_facts} and ask each once, so that neither a habit of shorter documents nor "
        "repeating an earlier answer helps, and the held-out losses are those of this harder task. "
        f"Naming one of the document's {num_facts} values at random would be right in {1 / num_facts:.1%}. "
    )


def _retrieval_section(table: dict[str, Any], seeds: list[int], config: dict[str, Any]) -> list[str]:
    lines = [
        "## Retrieval: is the fact given back?",
        "",
        f"{table['trials_per_run']:,} questions a run, the same ones in all. An answer counts if the most likely "
        "token is right at each of its positions. "
        f"{_task(config)}95 % binomial intervals within each run, in %:",
        "",
        "| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "| --- |" + " --- |" * len(seeds),
        *(
            f"| {LABELS[o]} | " + " | ".join(f"{100 * low:.1f} to {100 * high:.1f}" for low, high in intervals) + " |"
            for o, intervals in table["within_run"].items()
        ),
        "",
        "![accuracy by depth and distance](depth.png)",
        "",
    ]
    for by, title in (("depth", "depth (0: first fact, 1: last)"), ("distance", "tokens from fact to answer")):
        lines += [
            f"| {title} | questions | NTP | MEAP | MEAP - NTP, 95 % interval over seeds |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in table[by]:
            ntp, meap = (f"{100 * row[o]['mean']:.1f} ± {100 * row[o]['sd']:.1f}" for o in LABELS)
            difference = _interval(row["difference"], percent=True)
            lines.append(f"| {_group(row)} | {row['trials_per_run']:,} | {ntp} | {meap} | {difference} |")
        lines.append("")
    return lines


def _group(row: dict[str, Any]) -> str:
    return f"{row['low']:g} to {row['high']:g}"


def _title(name: str) -> str:
    evaluator, metric = name.split("/")
    source = evaluator.removeprefix("test_").removesuffix("_answers")
    kinds = {"loss": "loss", "masked_loss": "loss, masked inputs", "accuracy": "answers exactly right, %"}
    return f"{source}: {kinds[metric]}"


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.1f}" if percent else f"{value:.3f}"


def _interval(difference: dict[str, float], percent: bool) -> str:
    scale, digits = (100, 1) if percent else (1, 3)
    estimate, low, high = (scale * difference[key] for key in ("estimate", "low", "high"))
    return f"{estimate:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _verdict(difference: Interval, higher_is_better: bool) -> str:
    assert difference.low is not None and difference.high is not None, "there are two seeds or more"
    if difference.low <= 0 <= difference.high:
        return "the interval contains 0, so these seeds show no difference."
    return f"{'MEAP' if (difference.estimate > 0) == higher_is_better else 'NTP'} is better beyond the spread of seeds."
