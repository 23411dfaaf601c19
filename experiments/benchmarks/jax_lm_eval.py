"""Our model class as a worker of `lm_eval`."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from experiments.benchmarks.workload import devices
from meap_jax import hub
from meap_jax.data.prepared import Prepared
from meap_jax.errors import ConfigError
from meap_jax.evals import Setting
from meap_jax.evals.harness_model import HarnessModel
from meap_jax.evals.predictions import Predictions


def build(spec: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, Callable]]:
    """Opens a folder of the hub and answers requests.

    Args:
      spec: `folder`, of the hub; `requests`, a file of JSON, [N] of context and continuation; `batch_size`, rows at a
        time.

    Returns:
      What `about` says, and the command `score()`, which returns the seconds of answering all requests anew.
    """
    opened = hub.open_hub_model(Path(spec["folder"]), mesh=dict(data=len(devices()), fsdp=1))
    opened.model.config.eval.batch_size = spec["batch_size"]

    def no_data() -> Prepared:
        raise ConfigError("requests need no data of a run.")

    setting = Setting.of_model(opened, "test", no_data, None, "")
    texts = json.loads(Path(spec["requests"]).read_text())
    requests = [Instance("loglikelihood", {}, (a, b), i) for i, (a, b) in enumerate(texts)]
    predictions = Predictions(None, "commonsense", "")
    model = HarnessModel(setting, opened.params, predictions)

    def score() -> tuple[float, list]:
        predictions.records.clear()
        began = time.perf_counter()
        found = model.loglikelihood(requests, disable_tqdm=True)
        return time.perf_counter() - began, found

    _, found = score()
    tokens = sum(len(model.tok_encode(a + b)) for a, b in texts)
    about = {
        "parameters": opened.model.definition.config.num_parameters,
        "log_probs": [log_prob for log_prob, _ in found],
        "tokens": tokens,
    }
    return about, {"score": lambda: score()[0]}
