"""The harness' Hugging Face backend as a worker of `lm_eval`."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def build(spec: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, Callable]]:
    """As `jax_lm_eval.build`; `score(n)` takes n requests at a time, and by default as many as the harness finds.

    It looks for that number once, before anything is timed.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model: Any = HFLM(spec["folder"], batch_size="auto", device="cpu", dtype="float32", add_bos_token=True)
    texts = json.loads(Path(spec["requests"]).read_text())
    requests = [Instance("loglikelihood", {}, (a, b), i) for i, (a, b) in enumerate(texts)]

    def score(batch_size: int | str) -> tuple[float, list]:
        model.batch_size_per_gpu = batch_size
        began = time.perf_counter()
        with torch.inference_mode():
            found = model.loglikelihood(requests, disable_tqdm=True)
        return time.perf_counter() - began, found

    _, answers = score("auto")
    found = model.batch_sizes[0]
    about = {"batch_size": found, "log_probs": [log_prob for log_prob, _ in answers]}
    return about, {"score": lambda batch_size=found: score(batch_size)[0]}
