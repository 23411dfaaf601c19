"""Exact-match retrieval: does the model give back the fact that it was told?

An answer counts if, given the document up to it, the most likely token is right at each of its positions. Under teacher
forcing this equals exact match of greedy decoding: both go on only while every token so far was right.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from meap_jax import sharding
from meap_jax.data.prepared import Blocks
from meap_jax.evals.batching import batches
from meap_jax.model.decoder import Definition, Params
from meap_jax.model.visibility import causal
from meap_jax.objective import clean_inputs

QUESTION_DTYPE = np.dtype([
    ("row", "<i4"), ("start", "<i4"), ("length", "<i4"), ("depth", "<f4"), ("distance", "<i4")
])  # fmt: skip


class Answers(NamedTuple):
    """One entry an answer, [N] each."""

    correct: np.ndarray  # bool
    depth: np.ndarray  # float, 0 = first fact of the context, 1 = last.
    distance: np.ndarray  # int, tokens from the stated value to the answer.


class Retrieval:
    """Share of answers that are exactly right, over held-out documents."""

    def __init__(self, config: ml_collections.ConfigDict, definition: Definition, blocks: Blocks, mesh: Mesh):
        self._blocks, self._mesh = blocks, mesh
        self._batch_size, self._max_rows = config.global_batch_size, config.eval.max_rows
        answers = questions(blocks.spans("fact"), blocks.spans("answer"))
        self._answers = answers[answers["row"] < config.eval.max_rows]
        self._step = jax.jit(functools.partial(_hits, definition), out_shardings=sharding.replicated(mesh))

    def run(self, params: Params) -> Iterator[tuple[str, float]]:
        """Yields the accuracy."""
        yield "accuracy", float(np.mean(self.answers(params).correct))

    def answers(self, params: Params) -> Answers:
        """Every answer by itself."""
        hits = [
            self._step(params, batch) for batch in batches(self._blocks, self._mesh, self._batch_size, self._max_rows)
        ]
        hits_NxT = np.concatenate(jax.device_get(hits))
        return Answers(
            correct=exact_matches(hits_NxT, self._answers),
            depth=np.asarray(self._answers["depth"], float),
            distance=np.asarray(self._answers["distance"], int),
        )


def questions(facts: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """How deep the fact that an answer repeats is in its document, and how far away.

    Args:
      facts: `Blocks.spans("fact")`, the values where they are stated; its column `fact` numbers those of a document.
      answers: `Blocks.spans("answer")`, the values where they are asked for, with the `fact` that states each.

    Returns:
      [number of answers] of QUESTION_DTYPE: `row`, `start` and `length` of the answer; `depth` of its fact, 0 for the
      first of the document and 1 for the last; `distance` in tokens from the value's first one there to the answer's.
    """
    stated = {(fact["document"], fact["fact"]): int(fact["start"]) for fact in facts}
    num_facts = Counter(facts["document"].tolist())
    out = np.empty(len(answers), QUESTION_DTYPE)
    for i, a in enumerate(answers):
        depth = a["fact"] / max(num_facts[a["document"]] - 1, 1)
        distance = a["start"] - stated[a["document"], a["fact"]]
        out[i] = a["row"], a["start"], a["length"], depth, distance
    return out


def exact_matches(hits: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Whether every token of each answer is a hit.

    Args:
      hits: [N, T] bool; hits[n, t] says that the most likely token after position t of block n is the block's next one.
      answers: records with `row`, `start` (position in the block) and `length`.

    Returns:
      [number of answers] bool.
    """
    return np.array([hits[a["row"], a["start"] - 1 : a["start"] - 1 + a["length"]].all() for a in answers], bool)


def _hits(definition: Definition, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
    inputs = clean_inputs(batch)
    logits = definition.apply(params, inputs.tokens, causal(inputs.tokens, inputs.segment_ids))
    return jnp.argmax(logits, axis=-1) == inputs.targets
