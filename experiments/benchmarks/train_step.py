"""Our train step against PyTorch's on the same machine, and against what the machine can do.

python -m experiments.benchmarks.train_step [--no-torch] [--sizes=1M,10M,50M] [--repeats=N] [--quick] [--json=FILE]
pip install -r requirements-parity.txt   # torch and transformers, before the first comparison

On a CPU: decoders of about 1, 10 and 50 million parameters at T = 256 and 512, in float32. Ours is `train.compile_step`
under NTP with all its metrics and its layers unrolled (`model.unroll`, which changes the program and never the state);
the scanned program, every config's default, takes turns with it. Theirs is transformers' LlamaForCausalLM of the same
sizes, eager and under torch.compile, whose layers are a Python loop and so unrolled too. Both clip by the global norm
and update with AdamW, of the same settings. The share of the peak is the model's FLOP/s (`metrics.model_flops`,
attention counted causal) over a [2048, 2048] float32 product, torch's or JAX's, whichever was faster in that round.

Engines are processes that take turns. In one process they would share an allocator, whose state one engine leaves to
the other, and the threads of one would still spin (OpenMP's do for some milliseconds after their work) when the other
begins. A process that waits for its turn sleeps on a pipe: measured for a round, its CPU time is below 1 % of the
turn's. All inherit the cores, the environment and so the allocator's setting (GLIBC_TUNABLES) of this command, and use
one thread a core. A turn begins with a step that does not count, for the caches that the other engine filled.

On a GPU or TPU: the paper's 1.1B decoder at T = 4096 in bfloat16, with batches of powers of two a device until memory
ends, each in a fresh process, and MFU. Then torch, if it sees the same GPU, on the largest of these batches that it can
take. Two such programs don't fit one memory together, so that they run one after the other there.
"""

import argparse
import contextlib
import logging
import math
import os
import subprocess
import sys
from typing import Any

import ml_collections
import numpy as np

from experiments.benchmarks import harness
from experiments.benchmarks.timing import Ratio, Timings, interleave
from experiments.benchmarks.worker import OutOfMemory, Worker, WorkerError
from experiments.benchmarks.workload import SIZES, checked_sizes, config_of
from meap_jax.config import paper
from meap_jax.errors import ConfigError

OURS, THEIRS = "experiments.benchmarks.jax_engine", "experiments.benchmarks.torch_engine"
ENGINES = {"ours": (OURS, {}), "eager": (THEIRS, {"compiled": False}), "compiled": (THEIRS, {"compiled": True})}
SEQ_LENS = (256, 512)
BATCH_SIZES = {"tiny": 2, "1M": 8, "10M": 8, "50M": 4}
MATMUL = 2048
TURN_SECONDS = 1.0  # Of steps that count, at least.

_log = logging.getLogger("meap_jax.experiments.benchmarks.train_step")  # Not __name__, which is __main__ here.


def measure(args: argparse.Namespace) -> list[harness.Table]:
    """The tables of this benchmark."""
    sizes = checked_sizes(args)
    engines = ["ours"] if args.no_torch else list(ENGINES)
    try:
        backend, num_devices = _backend()
        if backend != "cpu":
            return [on_accelerator(paper_config(args.remat), num_devices, engines, args.repeats)]
        seq_lens = (32,) if args.quick else SEQ_LENS
        cases = [(size, seq_len) for size in sizes for seq_len in seq_lens]
        rows = []
        for case in cases:
            rows.append(on_cpu(*case, engines, args.repeats, quick=args.quick))
            _log.info("%s", {column: harness.cell(value) for column, value in rows[-1].items()})
    except WorkerError as error:
        raise ConfigError(str(error)) from error
    note = f"Threads: {len(os.sched_getaffinity(0))} in each engine. "
    note += "" if args.no_torch else "Ratios are of tokens/s: above 1, ours is the faster."
    return [harness.Table("Train step, float32", rows, note.strip())]


def on_cpu(size: str, seq_len: int, engines: list[str], repeats: int, *, quick: bool) -> dict[str, Any]:
    """One row: engines in turns on one decoder."""
    shape: dict[str, Any] = dict(seq_len=seq_len, batch_size=BATCH_SIZES[size])
    config = config_of(size, unroll=SIZES[size]["num_layers"], **shape)
    matmul = 256 if quick else MATMUL
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(_start(name, config)) for name in engines}
        workers["scanned"] = stack.enter_context(_start("ours", config_of(size, **shape)))
        check_same_work({name: worker.about for name, worker in workers.items()}, config.model.vocab_size)
        slowest = max(worker.ask("steps", 1) for worker in workers.values())
        num = 1 if quick else max(1, math.ceil(TURN_SECONDS / slowest))
        turns = {name: (lambda worker=worker: worker.ask("steps", num)) for name, worker in workers.items()}
        for name in engines[:2]:  # torch's product is the same in both of its processes.
            turns[f"matmul {name}"] = lambda worker=workers[name]: worker.ask("matmul", matmul)
        timings = interleave(turns, rounds=repeats)
        about = workers["ours"].about
    return {
        "decoder": size,
        "parameters": about["parameters"],
        "T": seq_len,
        "B": config.global_batch_size,
        **_against_torch(timings, engines),
        "ours, unrolled / scanned": timings.ratio("scanned", "ours"),
        "ours, share of the matmul peak": _share_of_peak(timings, about["flops"], 2 * matmul**3),
        "ours, tokens/s": config.global_batch_size * seq_len / timings.median("ours"),
    }


def check_same_work(abouts: dict[str, dict[str, Any]], vocab_size: int) -> None:
    """Stops a comparison of engines that don't train the same decoder.

    Raises:
      WorkerError: for other parameter counts or threads, or a first loss far from that of a fresh decoder.
    """
    for what in ("parameters", "threads"):
        found = {name: about[what] for name, about in abouts.items()}
        if len(set(found.values())) > 1:
            raise WorkerError(f"the engines differ in {what}: {found}.")
    for name, about in abouts.items():
        if not abs(about["first_loss"] - math.log(vocab_size)) < 1:
            raise WorkerError(f"the first loss of {name} is {about['first_loss']}, far from ln {vocab_size}.")


def _against_torch(timings: Timings, engines: list[str]) -> dict[str, Any]:
    theirs = [name for name in engines if name != "ours"]
    if not theirs:
        return {}
    faster = min(theirs, key=timings.median)
    ratios: dict[str, Any] = {f"ours / torch {name}": timings.ratio(name, "ours") for name in theirs}
    return ratios | {"ours / faster torch": timings.ratio(faster, "ours")}


def _share_of_peak(timings: Timings, step_flops: int, matmul_flops: int) -> Ratio:
    products = np.stack([taken for name, taken in timings.seconds.items() if name.startswith("matmul")])
    return Ratio.of(step_flops / timings.seconds["ours"] / (matmul_flops / products.min(axis=0)))


# --------------------------------------------------------------------------------------------------------- accelerators


def paper_config(remat: str | None) -> ml_collections.ConfigDict:
    """The paper's 1.1B decoder as `configs/ntp_1b.py` trains it, but for the batch and the source of the data."""
    config = paper("1b", "ntp")
    config.grad_accum_steps = 1
    config.data.mixture = "stdlib=1"
    if remat is not None:
        config.model.remat = remat
    return config


def on_accelerator(
    config: ml_collections.ConfigDict,
    num_devices: int,
    engines: list[str],
    repeats: int,
    most_rows: int | None = None,
) -> harness.Table:
    """A row a batch for ours, then one for each of torch's, which run on one device.

    Args:
      config: whose `global_batch_size` is set here.
      num_devices: that JAX has.
      engines: names from `ENGINES`, ours first.
      repeats: rounds.
      most_rows: a batch size to end at, where memory does not.

    Raises:
      WorkerError: if not even one row a device fits.
    """
    # What the process may take, of all that the device has; by default a quarter is left to others.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    rows: list[dict[str, Any]] = []
    batch_size, ended = num_devices, ""
    while most_rows is None or batch_size <= most_rows:
        config.global_batch_size = batch_size
        try:
            about, seconds = _alone("ours", config, repeats)
        except OutOfMemory as error:
            ended = f"No room for B = {batch_size}."
            if not rows:
                raise WorkerError(f"the decoder does not fit with {batch_size} rows ({error}).") from error
            break
        rows.append(_accelerator_row(f"ours, {about['engine']}", about, config, seconds, about))
        _log.info("%s", {column: harness.cell(value) for column, value in rows[-1].items()})
        ours, batch_size = about, batch_size * 2
    fastest = max(row["tokens/s a device"] for row in rows)
    if engines[1:] and _torch_sees(ours["device"]):
        for name in engines[1:]:
            rows.append(_torch_row(name, config, repeats, ours, batch_size // 2))
    elif engines[1:]:
        ended += f" torch sees no {ours['device']}, so that it is left out."
    for row in rows:
        row["tokens/s, fastest of ours / this"] = fastest / row["tokens/s a device"]
    title = (
        f"Train step, {ours['parameters']:,} parameters, T = {config.seq_len}, {config.model.dtype}, {ours['device']}"
    )
    return harness.Table(title, rows, f"model.remat is {config.model.remat}. {ended}".strip())


def _torch_row(
    name: str, config: ml_collections.ConfigDict, repeats: int, ours: dict[str, Any], batch_size: int
) -> dict[str, Any]:
    while True:
        config.global_batch_size = batch_size
        try:
            about, seconds = _alone(name, config, repeats)
            return _accelerator_row(f"torch {name}, {about['engine']}", about, config, seconds, ours)
        except OutOfMemory:
            if batch_size == 1:
                raise
            batch_size //= 2


def _alone(name: str, config: ml_collections.ConfigDict, repeats: int) -> tuple[dict[str, Any], np.ndarray]:
    """(what the engine says of itself, seconds a step in every round) of an engine that has the device to itself."""
    with _start(name, config, on_gpu=True) as worker:
        worker.ask("steps", 1)
        return worker.about, np.array([worker.ask("steps", 3) for _ in range(repeats)])


def _accelerator_row(
    name: str, about: dict[str, Any], config: ml_collections.ConfigDict, seconds: np.ndarray, ours: dict[str, Any]
) -> dict[str, Any]:
    num_tokens = config.global_batch_size * config.seq_len
    num_devices = about.get("num_devices", 1)
    flops = ours["flops"] / ours["num_tokens"] * num_tokens
    temp = about.get("temp_bytes")
    return {
        "engine": name,
        "B": config.global_batch_size,
        "tokens/s a device": num_tokens / num_devices / float(np.median(seconds)),
        "MFU": Ratio.of(flops / seconds / (ours["peak_flops"] * num_devices)) if ours["peak_flops"] else None,
        "temp GiB": None if temp is None else temp / 2**30,
    }


# ------------------------------------------------------------------------------------------------------------ processes


def _start(name: str, config: ml_collections.ConfigDict, *, on_gpu: bool = False) -> Worker:
    module, spec = ENGINES[name]
    return Worker(module, {"config": config.to_dict(), "on_gpu": on_gpu, **spec})


def _torch_sees(device: str) -> bool:
    """Whether torch, too, has one GPU of the kind that JAX calls so: "1 x NVIDIA H100 80GB HBM3"."""
    code = "import torch; print(torch.cuda.device_count(), 'x', torch.cuda.get_device_name())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return found.returncode == 0 and found.stdout.strip() == device and device.startswith("1 x ")


def _backend() -> tuple[str, int]:
    """JAX's platform and its devices, found out in another process: this one must not take hold of them."""
    code = "import jax; print(jax.default_backend(), jax.device_count())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        raise WorkerError(f"JAX finds no device: {found.stderr.strip().splitlines()[-1]}")
    backend, num = found.stdout.split()[-2:]
    return backend, int(num)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-torch", action="store_true", help="our side alone")
    parser.add_argument("--sizes", default="1M,10M,50M", help="on a CPU: decoders, of %(default)s")
    parser.add_argument("--remat", help="on an accelerator: model.remat of the 1.1B decoder, in place of the config's")


command = harness.main("train_step", __doc__, measure, repeats=5, add_flags=_add_flags)

if __name__ == "__main__":
    harness.run(command)
