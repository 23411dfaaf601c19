"""transformers' `generate` as a worker of `generation`."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers


def build(spec: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, Callable]]:
    """As `jax_generation.build`, with the model in float32, SDPA attention and a cache; `never` are ids left out."""
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        spec["folder"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(spec["prompts"])
    settings: dict[str, Any] = dict(
        attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, suppress_tokens=spec["never"]
    )

    def run(num: int) -> tuple[float, list]:
        began = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(ids, max_new_tokens=num, min_new_tokens=num, **settings)
        return time.perf_counter() - began, found[:, ids.shape[1] :].tolist()

    def decode() -> float:
        return run(spec["num_new"] + 1)[0] - run(1)[0]

    _, tokens = run(spec["num_new"] + 1)
    about = {
        "engine": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "threads": threads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens,
    }
    return about, {"prefill": lambda: run(1)[0], "decode": decode}
