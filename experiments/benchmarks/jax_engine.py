"""Our train step as a worker of `train_step`."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from experiments.benchmarks.timing import timed
from experiments.benchmarks.workload import Workload, temp_bytes
from meap_jax.hardware import detect
from meap_jax.metrics import model_flops


def build(spec: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, Callable]]:
    """The step of `spec["config"]`, a run's config as a dict; see `torch_engine.build` for the commands."""
    config = ml_collections.ConfigDict(spec["config"])
    workload = Workload(config)

    def steps(num: int) -> float:
        jax.block_until_ready(workload.step())  # Caches and threads are the other engine's until now.
        return timed(workload.step, num)()

    device = workload.mesh.devices.flat[0]
    chip = detect(device.device_kind)
    model = workload.definition.config
    about = {
        "engine": f"jax {jax.__version__}",
        "device": f"{workload.mesh.size} x {device.device_kind}",
        "threads": len(os.sched_getaffinity(0)) if device.platform == "cpu" else None,  # What XLA's pool has.
        "num_devices": workload.mesh.size,
        "peak_flops": None if chip is None else chip.peak_flops,
        "parameters": model.num_parameters,
        "flops": model_flops(model, config.seq_len, workload.num_tokens),
        "num_tokens": workload.num_tokens,
        "first_loss": float(workload.step()["loss"]),
        "temp_bytes": temp_bytes(workload.program),
    }
    return about, {"steps": steps, "matmul": matmul}


def matmul(size: int) -> float:
    """Seconds of a [size, size] float32 matrix product."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    return timed(lambda: product(x, x), 3)()
