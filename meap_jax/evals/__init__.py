"""Evaluators: each has `run(params)`, which yields (name, value); `main` hands them to the loop."""

from collections.abc import Mapping

import ml_collections
from jax.sharding import Mesh

from meap_jax.data.prepared import Prepared
from meap_jax.evals.retrieval import Retrieval
from meap_jax.evals.validation import Validation
from meap_jax.model.decoder import Definition


def make_evaluators(
    config: ml_collections.ConfigDict, definition: Definition, prepared: Prepared, mesh: Mesh, split: str
) -> Mapping[str, Validation | Retrieval]:
    """Every evaluator that the prepared data has held-out rows for, by the name of its metrics.

    Args:
      config: of the run.
      definition: of the decoder.
      prepared: frozen data.
      mesh: as in training.
      split: "validation" or "test".
    """
    evaluators: dict[str, Validation | Retrieval] = {}
    for source in prepared.sources:
        blocks = prepared.blocks(source, split)
        if len(blocks):
            evaluators[f"{split}_{source}"] = Validation(config, definition, blocks, mesh)
        if len(blocks.spans("answer")):
            evaluators[f"{split}_{source}_answers"] = Retrieval(config, definition, blocks, mesh)
    return evaluators
