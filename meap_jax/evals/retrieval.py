"""Exact-match retrieval: does the model give back the fact that it was told?

An answer counts if, given the document up to it, the most likely token is right at each of its positions. Under teacher
forcing this equals exact match of greedy decoding: both go on only while every token so far was right.
"""

import functools
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
        answers = blocks.answers
        self._answers = answers[answers["row"] < config.eval.max_rows]
        self._step = jax.jit(functools.partial(_hits, definition), out_shardings=sharding.replicated(mesh))

    def run(self, params: Params) -> Iterator[tuple[str, float]]:
        """Yields the accuracy."""
        yield "accuracy", float(np.mean(self.answers(params).correct))

    def answers(self, params: Params) -> Answers:
        """Every answer by itself."""
        size, seq_len, num_rows = self._batch_size, self._blocks.block_len - 1, min(self._max_rows, len(self._blocks))
        num_rows += -num_rows % size  # The last batch is filled up.
        at = answer_positions(self._answers, num_rows, seq_len)
        place = sharding.batch_sharding(self._mesh)
        hits = [
            self._step(params, batch, sharding.put_whole(place, at[i * size : (i + 1) * size]))
            for i, batch in enumerate(batches(self._blocks, self._mesh, size, self._max_rows))
        ]
        hits_NxT = np.zeros((num_rows, seq_len), bool)
        np.put_along_axis(hits_NxT, at, np.concatenate(jax.device_get(hits)), axis=1)
        return Answers(
            correct=exact_matches(hits_NxT, self._answers),
            depth=np.asarray(self._answers["depth"], float),
            distance=np.asarray(self._answers["distance"], int),
        )


def answer_positions(answers: np.ndarray, num_rows: int, seq_len: int) -> np.ndarray:
    """The positions whose next token is of an answer.

    Args:
      answers: records with `row`, `start` (position in the block) and `length`.
      num_rows: R, blocks and what they are filled up with.
      seq_len: T.

    Returns:
      [R, N] int32, each row's in order; N is that of the row with most of them, and other positions fill up the rest.
    """
    is_asked = np.zeros((num_rows, seq_len), bool)
    for a in answers:
        is_asked[a["row"], a["start"] - 1 : a["start"] - 1 + a["length"]] = True
    first_asked = np.argsort(~is_asked, axis=1, kind="stable").astype(np.int32)
    return first_asked[:, : is_asked.sum(axis=1).max(initial=0)]


def exact_matches(hits: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Whether every token of each answer is a hit.

    Args:
      hits: [N, T] bool; hits[n, t] says that the most likely token after position t of block n is the block's next one.
      answers: records with `row`, `start` (position in the block) and `length`.

    Returns:
      [number of answers] bool.
    """
    return np.array([hits[a["row"], a["start"] - 1 : a["start"] - 1 + a["length"]].all() for a in answers], bool)


def _hits(definition: Definition, params: Params, batch: dict[str, jax.Array], at: jax.Array) -> jax.Array:
    """[B, N] bool: whether the most likely token after each of the positions `at` is the one that stands there."""
    inputs = clean_inputs(batch)
    logits = definition.apply(params, inputs.tokens, causal(inputs.tokens, inputs.segment_ids), at=at)
    return jnp.argmax(logits, axis=-1) == jnp.take_along_axis(inputs.targets, at, axis=1)
