"""Our prefill, decoding, import and export against transformers and safetensors on the same machine.

python -m experiments.benchmarks.generation [--no-torch] [--sizes=1M,10M,50M] [--repeats=N] [--quick] [--json=FILE]
pip install -r requirements-parity.txt   # torch and transformers, before the first comparison

Generation: 8 prompts of 128 and of 512 tokens, 64 greedy tokens after each, float32, by `meap_jax.generator.Generator`
and by transformers' `generate` (torch eager, SDPA, its own cache). Both read the same exported folder. Prefill is a
call for one token, decoding the difference between a call for 65 and that. Engines take turns, as in
`train_step`.

Files: a bfloat16 checkpoint is read into parameters (`hub.open_hub_model`), and written (`export.export_model`,
which restores ours first), beside `safetensors.numpy.load_file` and `save_file` of the same tensors.
"""

import argparse
import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from experiments.benchmarks import harness
from experiments.benchmarks.timing import interleave, timed
from experiments.benchmarks.worker import Worker, WorkerError
from experiments.benchmarks.workload import checked_sizes, config_of
from meap_jax import checkpoint, export, hub, models, tokenizers
from meap_jax.errors import ConfigError
from meap_jax.hf.tokenizer import open_hub_tokenizer

OURS, THEIRS = "experiments.benchmarks.jax_generation", "experiments.benchmarks.torch_generation"
BATCH_SIZE, NUM_NEW, LENGTHS = 8, 64, (128, 512)


def measure(args: argparse.Namespace) -> list[harness.Table]:
    """The tables of this benchmark."""
    sizes = checked_sizes(args)
    lengths, num_new = ((16,), 4) if args.quick else (LENGTHS, NUM_NEW)
    rows, files = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for size in sizes:
            workdir = _fresh(Path(scratch, size), size)
            folder = Path(scratch, f"{size}-hub")
            export.export_model(epath.Path(workdir), epath.Path(folder), dtype="float32", keep_padding=True)
            rows += [_generation(size, folder, T, num_new, args) for T in lengths]
            files.append(_files(size, Path(workdir), Path(scratch), args.repeats))
    note = f"Threads: {len(os.sched_getaffinity(0))} in each engine. Ratios are of speeds: above 1, ours is the faster."
    return [
        harness.Table(f"Generation, float32, B = {BATCH_SIZE}, {num_new} tokens", rows, note),
        harness.Table("Reading and writing a bfloat16 checkpoint", files),
    ]


def _fresh(workdir: Path, size: str) -> Path:
    """A workdir with a model of this size that nothing trained, and a tokenizer that fits it."""
    config = config_of(size, seq_len=2_048, batch_size=BATCH_SIZE)
    words = (f"{a}{b}" for a in "abcdefghijklmnopqrstuvwxyz" for b in "aeiou")
    tokenizer = tokenizers.train_bpe(words, max(config.model.vocab_size, 300))
    config.model.vocab_size = max(config.model.vocab_size, tokenizer.vocab_size)
    opened = models.fresh_model(config)
    models.write_config(epath.Path(_made(workdir)), config)
    meta = {"tokenizer": models.save_tokenizer(epath.Path(workdir), tokenizer), "config": config.to_dict()}
    checkpoint.save_params(epath.Path(workdir), opened.params, meta)
    return workdir


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _generation(size: str, folder: Path, T: int, num_new: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: engines in turns on one model and one length."""
    prompts = np.random.default_rng(0).integers(4, 260, (BATCH_SIZE, T)).tolist()
    tokenizer, _ = open_hub_tokenizer(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    never = sorted({tokenizer.mask_id, tokenizer.pad_id, *range(tokenizer.num_tokens, rows)})
    spec = {"folder": str(folder), "prompts": prompts, "num_new": num_new, "never": never}
    engines = {"ours": OURS} if args.no_torch else {"ours": OURS, "torch": THEIRS}
    try:
        with contextlib.ExitStack() as stack:
            workers = {name: stack.enter_context(Worker(module, spec)) for name, module in engines.items()}
            parts = ("prefill", "decode")
            turns = {
                f"{name} {part}": lambda worker=worker, part=part: worker.ask(part)
                for name, worker in workers.items()
                for part in parts
            }
            timings = interleave(turns, rounds=args.repeats)
            about = {name: worker.about for name, worker in workers.items()}
    except WorkerError as error:
        raise ConfigError(str(error)) from error
    row: dict[str, Any] = {"decoder": size, "parameters": about["ours"]["parameters"], "T": T}
    if "torch" in about:
        same = np.mean(np.array(about["ours"]["tokens"]) == np.array(about["torch"]["tokens"]))
        row |= {f"{part}, ours / torch": timings.ratio(f"torch {part}", f"ours {part}") for part in parts}
        row["tokens that agree"] = float(same)
    row["prefill, tokens/s"] = BATCH_SIZE * T / timings.median("ours prefill")
    row["decode, tokens/s"] = BATCH_SIZE * num_new / timings.median("ours decode")
    return row


def _files(size: str, workdir: Path, scratch: Path, repeats: int) -> dict[str, Any]:
    """One row: reading and writing in turns with safetensors itself."""
    folder, ours, theirs = scratch / "written", scratch / "written again", scratch / "theirs.safetensors"
    export.export_model(epath.Path(workdir), epath.Path(folder), dtype="bfloat16", keep_padding=True)
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)

    def write() -> None:
        shutil.rmtree(ours, ignore_errors=True)
        export.export_model(epath.Path(workdir), epath.Path(ours), dtype="bfloat16", keep_padding=True)

    def save() -> None:
        safetensors.numpy.save_file(tensors, theirs)
        with theirs.open("rb") as written:
            os.fsync(written.fileno())  # As ours does.

    timings = interleave(
        {
            "read": timed(lambda: hub.open_hub_model(folder).params),
            "load": timed(lambda: list(safetensors.numpy.load_file(file)) and None),
            "write": timed(write),
            "save": timed(save),
        },
        rounds=repeats,
    )
    gigabytes = file.stat().st_size / 1e9
    shutil.rmtree(folder)
    return {
        "decoder": size,
        "MB": 1e3 * gigabytes,
        "import, s/GB": timings.median("read") / gigabytes,
        "import / load_file, time": timings.ratio("read", "load"),
        "export, s/GB": timings.median("write") / gigabytes,
        "export / save_file, time": timings.ratio("write", "save"),
    }


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-torch", action="store_true", help="our side alone")
    parser.add_argument("--sizes", default="1M,10M,50M", help="decoders, of workload.SIZES")


command = harness.main("generation", __doc__, measure, repeats=5, add_flags=_add_flags)

if __name__ == "__main__":
    harness.run(command)
