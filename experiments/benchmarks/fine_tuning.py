"""Copies of answers behind one prompt, beside copies in rows of their own: tokens, and the time of an epoch.

python -m experiments.benchmarks.fine_tuning [--sizes=1M,10M] [--seq_len=1024] [--repeats=N] [--quick] [--json=FILE]

Samples have random tokens and lengths from a lognormal distribution. Those like Alpaca's have prompts of about 50
tokens with their template and answers of about 50; those with long prompts have about 600 and 100. A step's time is
that of a packed row, and an epoch's that of all rows. Steps under NTP, which needs no copies, stand beside.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import harness
from experiments.benchmarks.timing import Ratio, interleave, timed
from experiments.benchmarks.workload import Workload, checked_sizes, config_of
from meap_jax.data import plans
from meap_jax.data.samples import ANSWER, SampleBlocks, plan_pieces
from meap_jax.data.spec import ChatPlanSpec, data_spec
from meap_jax.data.store import EncodedDocument, Store, TokenSpan, ids_dtype, merge_indices, write_shard
from meap_jax.rows import stacked

# Medians of the lengths of prompts and of answers, and the standard deviation of their logarithms.
SAMPLES = {"like Alpaca's": (50, 50, 0.9), "long prompts": (600, 100, 0.5)}
ARRANGEMENTS = ("none", "separate", "shared_prefix")


def measure(args: argparse.Namespace) -> list[harness.Table]:
    """The table of this benchmark."""
    seq_len, number = (255, 60) if args.quick else (args.seq_len, 2_000)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, lengths in SAMPLES.items():
            store = _store(Path(folder, name), *lengths, number, seq_len)
            rows += [_row(size, name, store, seq_len, args) for size in checked_sizes(args)]
    note = f"{number:,} samples in rows of {seq_len} tokens, masks of 10 % in answers of more than 50 tokens."
    return [harness.Table("An epoch of MEAP's fine-tuning by the place of copies", rows, note)]


def _store(folder: Path, prompt: int, answer: int, spread: float, number: int, seq_len: int) -> Store:
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(number):
        sizes = np.exp(rng.normal(np.log([prompt, answer]), spread)).astype(int)
        asked, said = np.clip(sizes, 4, seq_len // 3).tolist()
        ids = rng.integers(4, 60, asked + said).tolist()
        documents.append((0, EncodedDocument(ids, (TokenSpan(asked, said, ANSWER),))))
    folder.mkdir()
    write_shard(folder, 0, documents, ids_dtype(64))
    merge_indices(folder, 1)
    return Store(folder, [number], ids_dtype(64))


def _row(size: str, name: str, store: Store, seq_len: int, args: argparse.Namespace) -> dict[str, Any]:
    workloads, num_rows, tokens = {}, {}, {}
    for arrangement in ARRANGEMENTS:
        config = config_of(size, seq_len=seq_len, batch_size=4)
        config.data.mixture, config.data.sources.text.format = "text=1", "chat"
        config.sft.arrangement = arrangement
        config.objective.update(dict(name="ntp" if arrangement == "none" else "meap", mask_ratio=0.1))
        spec = data_spec(config)
        plan_spec = spec.plans["text"]
        assert isinstance(plan_spec, ChatPlanSpec)
        [plan] = plans.best_fit([plan_pieces(store, "train", plan_spec).slices], plan_spec.block_len)
        blocks = SampleBlocks(store, plan, plan_spec, spec.samples, pad_id=0)
        batch = stacked([blocks[i].only(spec.row_fields) for i in range(config.global_batch_size)])
        workloads[arrangement] = Workload(config, batch)
        num_rows[arrangement], tokens[arrangement] = len(blocks), int(plan.slices["length"].sum(dtype=np.int64))
    timings = interleave({key: timed(w.step) for key, w in workloads.items()}, rounds=args.repeats, warmup=2)

    def epoch(a: str, b: str) -> Ratio:
        return Ratio(*(num_rows[a] / num_rows[b] * x for x in timings.ratio(a, b)))

    return {
        "samples": name,
        "decoder": size,
        **{f"rows, {arrangement}": number for arrangement, number in num_rows.items()},
        "shared_prefix / separate, tokens": tokens["shared_prefix"] / tokens["separate"],
        "shared_prefix / separate, time of a step": timings.ratio("shared_prefix", "separate"),
        "shared_prefix / separate, time of an epoch": epoch("shared_prefix", "separate"),
        "separate / none, time of an epoch": epoch("separate", "none"),
    }


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", default="1M,10M", help="decoders, of workload.SIZES")
    parser.add_argument("--seq_len", type=int, default=1_024, help="tokens of a row")
    parser.set_defaults(no_torch=True)  # Ours alone.


command = harness.main("fine_tuning", __doc__, measure, repeats=7, add_flags=_add_flags)

if __name__ == "__main__":
    harness.run(command)
