"""The config of a tiny decoder, and tiny runs of the training command, for tests."""

import json
import os
import pathlib
import subprocess
import sys

from meap_jax import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent


def tiny_config(**overrides):
    """A decoder with two of everything that can be two (layers, query heads a kv head, kv heads), on rows of 16."""
    c = config_lib.base()
    c.model.update(dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, embed_dim=32, mlp_dim=48, vocab_size=64))
    c.objective.mask_id = 3
    c.global_batch_size, c.seq_len, c.num_steps, c.optimizer.learning_rate = 8, 16, 20, 1e-2
    c.update_from_flattened_dict(overrides)
    return c


# A model that compiles fast, on few and short documents; eight steps unless a test says otherwise.
TINY = {
    "seq_len": 80, "global_batch_size": 8, "num_steps": 8,
    "model.num_layers": 1, "model.num_heads": 2, "model.num_kv_heads": 1, "model.head_dim": 8,
    "model.embed_dim": 16, "model.mlp_dim": 24, "model.vocab_size": 512,
    "data.mixture": "retrieval=1", "data.retrieval.num_facts": 3, "data.retrieval.questions_per_fact": 0.7,
    "data.retrieval.num_eval_facts": 3,
    "data.retrieval.max_fillers": 1, "data.retrieval.num_documents": 80, "data.retrieval.num_eval_documents": 8,
    "log.every": 1, "eval.every": 4, "checkpoint.every": 2,
}  # fmt: skip

# Fields of a record that no two runs share.
TIMES = {
    "tokens_per_second", "tokens_per_second_per_device", "model_flops_per_second", "step_seconds", "step_seconds_p50",
    "step_seconds_p90", "data_wait", "goodput",
}  # fmt: skip

# For scripts: `peak()`, the bytes of memory that a process had at most.
PEAK = """
def peak():
    import pathlib, resource, sys
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # Since it began; ru_maxrss counts what the process had that started it, too.
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
"""


def flags(workdir, config="configs/quickstart.py", **overrides):
    """The flags of `python -m meap_jax.main` for a run of TINY with these overrides, `__` for a dot."""
    values = {**TINY, **{name.replace("__", "."): value for name, value in overrides.items()}}
    return [
        f"--config={ROOT / config}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


def command(workdir, **overrides):
    """The words of the training command with these flags."""
    return [sys.executable, "-m", "meap_jax.main", *flags(workdir, **overrides)]


def environment(**variables):
    """The environment of these tests for a process that sees one device, with these variables too."""
    one_device = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return {**os.environ, "XLA_FLAGS": one_device, "PYTHONPATH": str(ROOT), **variables}


def run(workdir, exit_code=0, **overrides):
    """Runs the training command to its end; returns what it logged."""
    words, pipes = command(workdir, **overrides), dict(text=True, capture_output=True, timeout=300)
    finished = subprocess.run(words, env=environment(), cwd=ROOT, **pipes)
    assert finished.returncode == exit_code, finished.stderr
    return finished.stderr


def records(workdir):
    """The records in metrics.jsonl."""
    return [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    """{step: (loss, gradient norm)}; fails if a step is in the log twice."""
    values = [(r["step"], (r["loss"], r["grad_norm"])) for r in records(workdir)]
    assert len(values) == len(dict(values)), "a step is in metrics.jsonl twice"
    return dict(values)
