"""The page that compares NTP, MEAP and a control: results.json, report.md and two pictures."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from experiments import report_plots
from experiments.outcomes import Outcomes, begun, by_arm, difference, p_value, spread, times_as_many, write_whole
from meap_jax.statistics import paired_t_interval

NTP, FROM_START, RAMPED, CONTROL = "ntp", "meap", "meap_ramped", "random_ramped"
Measure = Callable[[Outcomes], np.ndarray]  # Accuracy in % of each seed.
LEARNED = 95.0  # % on documents like those trained on.


def write(folder: epath.Path, outcomes: Sequence[dict[str, Any]], setting: dict[str, Any]) -> dict[str, Any]:
    """Writes results.json, learning.png, accuracy.png and report.md; returns the results.

    Args:
      folder: where they go.
      outcomes: `experiments.outcomes.outcome` of every arm with every seed.
      setting: config, data counts, versions and seconds by part (None if it was interrupted), for the record.
    """
    arms = by_arm(outcomes)
    results = {"seeds": arms[NTP].seeds, "summary": summary(arms), "runs": list(outcomes), "setting": setting}
    write_whole(folder / "results.json", results)
    config = setting["config"]
    report_plots.learning(folder / "learning.png", arms, _ramp_tokens(config))
    report_plots.accuracy(folder / "accuracy.png", arms)
    (folder / "report.md").write_text(page(arms, setting))
    return results


def summary(arms: dict[str, Outcomes]) -> dict[str, Any]:
    """The figures of the page's table, for programs."""
    baseline, found = arms[NTP], {}
    for name, arm in arms.items():
        longer = arm.settled("longer", arm.seeds)
        found[name] = {
            "onset_tokens": [o.tokens for o in arm.onsets(arm.seeds)],
            "is_censored": [o.is_censored for o in arm.onsets(arm.seeds)],
            "trained_accuracy": arm.settled("trained", arm.seeds).tolist(),
            "longer_accuracy": longer.tolist(),
            "longer_minus_ntp": paired_t_interval(longer - baseline.settled("longer", arm.seeds))._asdict(),
            "loss": arm.metric("retrieval/loss", arm.seeds).tolist(),
        }
    return found


def _ramp_tokens(config: dict[str, Any]) -> tuple[float, float]:
    """Between which two numbers of tokens the ratio of ramped arms goes up."""
    tokens = config["num_steps"] * config["global_batch_size"] * config["seq_len"]
    return config["objective"]["ramp_begin"] * tokens, config["objective"]["ramp_end"] * tokens


# ---------------------------------------------------------------------------------------------------------------- page


def page(arms: dict[str, Outcomes], setting: dict[str, Any]) -> str:
    """The report as Markdown."""
    config = setting["config"]
    lines = ["# NTP and MEAP, side by side", "", first_paragraph(arms, config), ""]
    lines += ["## When it began, and how it ended", "", *_table(arms), "", *_notes(arms, config), ""]
    lines += ["![learning curves](learning.png)", "", "## Which documents", "", *_documents(arms, config), ""]
    lines += ["![accuracy by facts, depth and distance](accuracy.png)", ""]
    lines += ["## Seed by seed", "", *_seeds(arms), ""]
    return "\n".join([*lines, *_how(config, setting), ""])


def first_paragraph(arms: dict[str, Outcomes], config: dict[str, Any]) -> str:
    """What came out, for somebody who knows neither the paper nor this code."""
    r, ratio = config["data"]["retrieval"], config["objective"]["mask_ratio"]
    seeds = arms[NTP].seeds
    said = [
        f"A small decoder reads documents that state {r['min_facts']} to {r['num_facts']} facts and then ask for them. "
        "Next-token prediction (NTP) sees all of a document; mask-enhanced prediction (MEAP) hides "
        f"{100 * ratio:g} % of its input tokens: from the first step on, or ramped up in the middle of training, which "
        "then begins as NTP."
    ]
    learned = [name for name in (NTP, RAMPED) if arms[name].settled("trained", seeds).min() > LEARNED]
    if len(learned) == 2:
        said.append(
            f"**NTP and ramped MEAP both learned to look facts up, in each of {len(seeds)} seeds**: they end above "
            f"{LEARNED:.0f} % on documents like those trained on."
        )
    else:
        missing = " and ".join(arms[name].label for name in (NTP, RAMPED) if name not in learned)
        said.append(
            f"**Not every run learned to look facts up**: of {missing}, some seed stays below {LEARNED:.0f} % on "
            "documents like those trained on, so what follows compares runs that did with runs that did not."
        )
    said.append(_began(arms))
    said.append(_longer(arms, r["num_eval_facts"]))
    return " ".join(said)


def _began(arms: dict[str, Outcomes]) -> str:
    """When NTP and MEAP from the start began."""
    seeds = arms[NTP].seeds
    ntp, meap = (arms[name].onsets(seeds) for name in (NTP, FROM_START))
    ntp_tokens = np.median([o.tokens for o in ntp]) / 1000
    if any(o.is_censored for o in ntp):
        return f"NTP began in {sum(not o.is_censored for o in ntp)} of {len(ntp)} seeds."
    said = f"NTP began after {ntp_tokens:,.0f} thousand tokens (median);"
    late = sum(o.is_censored for o in meap)
    if not late:
        return f"{said} masked from the start, MEAP needed {times_as_many(ntp, meap)} times as many."
    last = max(o.tokens for o in meap) / 1000
    return (
        f"{said} masked from the start, MEAP had not begun after {last:,.0f} thousand in {late} of {len(meap)} seeds."
    )


def _longer(arms: dict[str, Outcomes], num_facts: int) -> str:
    """Whether ramped MEAP and the control are better than NTP on longer documents."""
    seeds = arms[NTP].seeds
    ntp = arms[NTP].settled("longer", seeds)
    said = []
    for name in (RAMPED, CONTROL):
        own = arms[name].settled("longer", seeds)
        of = paired_t_interval(own - ntp)
        verdict = "more than" if (of.low or 0) > 0 else "less than" if (of.high or 0) < 0 else "not surely other than"
        said.append((arms[name].label, own.mean(), verdict, difference(own - ntp)))
    (label, mean, verdict, by), (control, control_mean, other, control_by) = said
    return (
        f"On documents of {num_facts} facts, more than any that was trained on, {label} answers {mean:.1f} % right, "
        f"{verdict} NTP's {ntp.mean():.1f} % ({by} points, 95 % interval over seeds). With {control}, the control, it "
        f"is {control_mean:.1f} %, {other} NTP's ({control_by})."
    )


def _table(arms: dict[str, Outcomes]) -> list[str]:
    baseline, chance = arms[NTP], next(iter(arms[NTP].runs.values()))["chance"]
    lines = [
        "| | onset, 1,000 tokens | times NTP's | p | documents as trained on, % right | longer ones, % right | "
        "longer: minus NTP | loss on clean test inputs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in arms.values():
        own, theirs = arm.onsets(arm.seeds), baseline.onsets(arm.seeds)
        is_same = own == theirs
        cells = [arm.label, begun(own)]
        cells += ["", ""] if is_same else [times_as_many(theirs, own), p_value(theirs, own)]
        cells += [spread(arm.settled(documents, arm.seeds)) for documents in ("trained", "longer")]
        longer = arm.settled("longer", arm.seeds) - baseline.settled("longer", arm.seeds)
        loss = arm.metric("retrieval/loss", arm.seeds)
        cells += ["" if arm is baseline else difference(longer), f"{loss.mean():.3f} ± {loss.std(ddof=1):.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    guessing = [f"{100 * chance[documents]:.1f}" for documents in ("trained", "longer")]
    return [*lines, f"| naming one of the values at random | | | | {guessing[0]} | {guessing[1]} | | |"]


def _notes(arms: dict[str, Outcomes], config: dict[str, Any]) -> list[str]:
    num = len(arms[NTP].seeds)
    o = config["objective"]
    return [
        f"{num} seeds. The runs of a seed share initial weights, batches, steps and learning rate. Ramped arms are the "
        f"NTP run of their seed until {100 * o['ramp_begin']:g} % of the run, and mask at the whole ratio from "
        f"{100 * o['ramp_end']:g} % on.",
        "",
        "- *Onset*: where accuracy on documents as trained on passes half of its range above chance; the median over "
        "seeds, and how many runs had begun by their end. *p*: permutation test against NTP's (exact up to "
        "10 seeds, else log-rank).",
        "- *% right*: mean over the last fifth of a run, for it swings; ± is the standard deviation over seeds. An "
        "answer is right if each of its tokens is the most likely one.",
        "- *minus NTP*: mean of the differences within seeds, with Student's 95 % interval over them. *Loss*: nats a "
        "token.",
    ]


def _documents(arms: dict[str, Outcomes], config: dict[str, Any]) -> list[str]:
    """Accuracy at the end by facts, then of the longest documents by depth and by distance."""
    baseline = arms[NTP]
    run = baseline.runs[baseline.seeds[0]]
    lines = [
        "At the end of training, on documents of the task `facts`: % right, mean over seeds, and in parentheses the "
        "mean difference to NTP with its 95 % interval.",
    ]
    r = config["data"]["retrieval"]
    facts = sorted({cell["num_facts"] for cell in run["cells"]})
    columns: list[tuple[str, dict[str, Measure]]] = [
        ("facts of the document", {f"{n}": functools.partial(_of_facts, n) for n in facts})
    ]
    for by, title in (
        ("depth", f"depth of the fact in documents of {facts[-1]} (0 first, 1 last)"),
        ("distance", f"tokens from fact to answer in documents of {facts[-1]}"),
    ):
        columns.append(
            (title, {f"{g['low']:g} to {g['high']:g}": functools.partial(_of_group, by, g["low"]) for g in run[by]})
        )
    for title, groups in columns:
        lines += ["", f"| {title} | " + " | ".join(arm.label for arm in arms.values()) + " |"]
        lines += ["| --- |" + " --- |" * len(arms)]
        for name, values_of in groups.items():
            ntp = values_of(baseline)
            cells = []
            for arm in arms.values():
                values = values_of(arm)
                cells.append(
                    f"{values.mean():.1f}" + (f" ({difference(values - ntp)})" if (values != ntp).any() else "")
                )
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, "", f"Documents of {r['min_facts']} to {r['num_facts']} facts were trained on."]


def _of_facts(num_facts: int, arm: Outcomes) -> np.ndarray:
    return arm.in_cells(arm.seeds, num_facts=(num_facts,))


def _of_group(by: str, low: float, arm: Outcomes) -> np.ndarray:
    return arm.in_group(arm.seeds, by, low)


def _seeds(arms: dict[str, Outcomes]) -> list[str]:
    """Onset and accuracies of every run."""
    seeds = arms[NTP].seeds
    lines = [
        "Onset in thousands of tokens (- : not begun), then % right on documents as trained on and on longer ones:",
        "",
        "| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "| --- |" + " --- |" * len(seeds),
    ]
    for arm in arms.values():
        rows = zip(arm.onsets(seeds), arm.settled("trained", seeds), arm.settled("longer", seeds), strict=True)
        cells = [f"{'-' if o.is_censored else f'{o.tokens / 1000:,.0f}'}; {a:.1f}, {b:.1f}" for o, a, b in rows]
        lines.append(f"| {arm.label} | " + " | ".join(cells) + " |")
    return lines


def _how(config: dict[str, Any], setting: dict[str, Any]) -> list[str]:
    model = config["model"]
    tokens = config["num_steps"] * config["global_batch_size"] * config["seq_len"]
    counts = "; ".join(
        f"{source}: {splits['train']['blocks']:,} training blocks, {splits['test']['blocks']:,} test blocks"
        for source, splits in setting["data"].items()
    )
    seconds = setting["seconds"]
    return [
        "## How it was made",
        "",
        f"- Decoder: {model['num_layers']} layers, width {model['embed_dim']}, {model['num_heads']} heads, vocabulary "
        f"{model['vocab_size']}, {model['dtype']}. A run: {config['num_steps']:,} steps of "
        f"{config['global_batch_size']} x {config['seq_len']} tokens ({tokens / 1e6:.1f}M), peak learning rate "
        f"{config['optimizer']['learning_rate']:g}, data {config['data']['mixture']}.",
        f"- Data {setting['fingerprint'][:12]}: {counts}.",
        "- "
        + ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
        + f"; {setting['cores']} cores.",
        *(["- Seconds: " + ", ".join(f"{part} {took:g}" for part, took in seconds.items()) + "."] if seconds else []),
        "- Everything above is in results.json, and each model in a folder of its own, as a run.",
        "",
        "A model and a budget of this size say how masking acts on one skill, not whether the paper is right about "
        "models that people use.",
    ]
