"""Requests of lm-evaluation-harness answered by our model class, and by the harness' own Hugging Face backend.

python -m experiments.benchmarks.lm_eval [--no-torch] [--sizes=1M,10M] [--repeats=N] [--quick] [--json=FILE]
pip install -r requirements-parity.txt   # lm-eval, torch and transformers

Documents are generated: a context of 60 to 120 words of one token and four endings of 10 to 40, as HellaSwag's are.
Both sides read one exported folder and are asked through `loglikelihood`, tokenization and all, in float32; of theirs
the batch size is the one that it finds itself (batch_size=auto), and finding it is not timed; a small one stands beside
it. Engines take turns, each in a process of its own. On cores that others use too torch's threads wait for each other,
so that only an idle machine gives a fair ratio: look at the load that is printed.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from experiments.benchmarks import harness
from experiments.benchmarks.timing import interleave
from experiments.benchmarks.worker import Worker, WorkerError
from experiments.benchmarks.workload import checked_sizes, config_of
from meap_jax import checkpoint, export, models, tokenizers
from meap_jax.errors import ConfigError

OURS, THEIRS = "experiments.benchmarks.jax_lm_eval", "experiments.benchmarks.torch_lm_eval"
WORDS = [f"{a}{b}" for a in "abcdefghijklmnopqrstuvwxyz" for b in "aeiou"]
SMALL = 8  # Requests at a time that suit a CPU's caches, where the harness goes up to what memory holds.
NUM_CHOICES, CONTEXT, ENDING = 4, (60, 120), (10, 40)  # Words of one token.


def measure(args: argparse.Namespace) -> list[harness.Table]:
    """The table of this benchmark."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-eval is not installed here: pip install -r requirements-parity.txt")
    if min(args.documents, args.batch_size) < 1:
        raise ConfigError(
            f"--documents is {args.documents} and --batch-size {args.batch_size}, but must be numbers from 1 on."
        )
    num_documents = 6 if args.quick else args.documents
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in checked_sizes(args):
            folder = Path(scratch, f"{size}-hub")
            _export_fresh(epath.Path(scratch, size), folder, size)
            rows.append(_row(size, folder, _requests(num_documents), args))
    note = (
        f"Threads: {len(os.sched_getaffinity(0))} in each engine. The ratio is of speeds: above 1, ours is the faster."
    )
    return [
        harness.Table(f"Requests of lm-eval, float32, {num_documents} documents x {NUM_CHOICES} endings", rows, note)
    ]


def _export_fresh(workdir: epath.Path, folder: Path, size: str) -> None:
    """Writes a folder of the hub with a model of this size that nothing trained, and a tokenizer of the words."""
    config = config_of(size, seq_len=512, batch_size=8)
    tokenizer = tokenizers.train_bpe([" ".join(WORDS)], max(config.model.vocab_size, 400))
    config.model.vocab_size = max(config.model.vocab_size, tokenizer.vocab_size)
    opened = models.fresh_model(config)
    workdir.mkdir(parents=True)
    models.write_config(workdir, config)
    meta = {"tokenizer": models.save_tokenizer(workdir, tokenizer), "config": config.to_dict()}
    checkpoint.save_params(workdir, opened.params, meta)
    export.export_model(workdir, epath.Path(folder), dtype="float32", keep_padding=True)


def _requests(num_documents: int) -> list[tuple[str, str]]:
    """Context and ending of each request, the endings of a document side by side."""
    rng = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    contexts = [text(*CONTEXT) for _ in range(num_documents)]
    return [(context, f" {text(*ENDING)}") for context in contexts for _ in range(NUM_CHOICES)]


def _row(size: str, folder: Path, requests: list[tuple[str, str]], args: argparse.Namespace) -> dict[str, Any]:
    """One row: engines in turns on one model."""
    file = folder.with_suffix(".json")  # Too much for a command line.
    file.write_text(json.dumps(requests))
    spec = {"folder": str(folder), "requests": str(file), "batch_size": args.batch_size}
    engines = {"ours": OURS} if args.no_torch else {"ours": OURS, "hf": THEIRS}
    try:
        with contextlib.ExitStack() as stack:
            workers = {name: stack.enter_context(Worker(module, spec)) for name, module in engines.items()}
            turns: dict[str, Callable[[], float]] = {
                name: functools.partial(worker.ask, "score") for name, worker in workers.items()
            }
            if "hf" in workers:
                turns["small"] = functools.partial(workers["hf"].ask, "score", SMALL)
            timings = interleave(turns, rounds=args.repeats)
            about = {name: worker.about for name, worker in workers.items()}
    except WorkerError as error:
        raise ConfigError(str(error)) from error
    row: dict[str, Any] = {
        "decoder": size,
        "parameters": about["ours"]["parameters"],
        "tokens a request": about["ours"]["tokens"] / len(requests),
        "ours, requests/s": len(requests) / timings.median("ours"),
    }
    if "hf" in about:
        differences = np.subtract(about["ours"]["log_probs"], about["hf"]["log_probs"])
        row["hf, requests/s"] = len(requests) / timings.median("hf")
        row["its batch size"] = about["hf"]["batch_size"]
        row["ours / hf"] = timings.ratio("hf", "ours")
        row[f"ours / hf, {SMALL} at a time"] = timings.ratio("small", "ours")
        row["largest difference, nats"] = float(np.abs(differences).max())
    return row


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-torch", action="store_true", help="our side alone")
    parser.add_argument("--sizes", default="1M,10M", help="decoders, of workload.SIZES")
    parser.add_argument("--documents", type=int, default=200, help="of the generated task")
    parser.add_argument("--batch-size", type=int, default=8, help="eval.batch_size: rows that ours takes at a time")


command = harness.main("lm_eval", __doc__, measure, repeats=5, add_flags=_add_flags)

if __name__ == "__main__":
    harness.run(command)
