"""Our generation as a worker of `generation`."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.workload import devices
from meap_jax import hub
from meap_jax.generator import Generator


def build(spec: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, Callable]]:
    """Opens a folder of the hub and continues prompts.

    Args:
      spec: `folder`, of the hub; `prompts`, [B][T] tokens; `num_new`, tokens after each.

    Returns:
      What `about` says, and the commands: `prefill()` returns the seconds of reading the prompts and choosing a token
      after each, `decode()` those of `num_new` more.
    """
    mesh = dict(data=len(devices()), fsdp=1)
    opened = hub.open_hub_model(Path(spec["folder"]), mesh=mesh)
    generator = Generator.of(opened, batch_size=len(spec["prompts"]), stops=())
    generator._stops = np.array([-2], np.int32)  # No token ends a text: every row has as much to do as theirs.
    prompts, num_new = spec["prompts"], spec["num_new"]

    def run(num: int) -> tuple[float, list]:
        began = time.perf_counter()
        found = generator.generate(prompts, max_new_tokens=num)
        return time.perf_counter() - began, [completion.tokens for completion in found]

    def decode() -> float:
        return run(num_new + 1)[0] - run(1)[0]

    _, tokens = run(num_new + 1)
    about = {
        "engine": f"jax {jax.__version__}",
        "threads": len(os.sched_getaffinity(0)),
        "parameters": opened.model.definition.config.num_parameters,
        "tokens": tokens,
    }
    return about, {"prefill": lambda: run(1)[0], "decode": decode}
