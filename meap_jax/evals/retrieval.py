"""Exact-match retrieval: the share of questions about a document's facts that a model answers right.

An answer counts if, given the document up to it, the most likely token is right at each of its positions. Under teacher
forcing this equals exact match of greedy decoding: both go on only while every token so far was right.
"""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from meap_jax import sharding
from meap_jax.data.prepared import Blocks
from meap_jax.evals.batching import batches, on_mesh
from meap_jax.evals.setting import Setting
from meap_jax.model.decoder import Definition, Params
from meap_jax.objective import clean_inputs
from meap_jax.results import Interval, Result
from meap_jax.rows import Row
from meap_jax.statistics import binomial_interval

QUESTION_DTYPE = np.dtype([
    ("row", "<i4"), ("start", "<i4"), ("length", "<i4"), ("depth", "<f4"), ("distance", "<i4"), ("num_facts", "<i4")
])  # fmt: skip
SPAN = ["row", "start", "length"]


def make(setting: Setting) -> dict[str, "Retrieval"]:
    """Makes one for each source whose held-out documents state facts and ask for them."""
    documents = {name: blocks for name, blocks in setting.held_out().items() if isinstance(blocks, Blocks)}
    asked = {name: blocks for name, blocks in documents.items() if len(blocks.spans("fact"))}
    return {f"{name}_answers": Retrieval(setting, blocks) for name, blocks in asked.items()}


class Retrieval:
    """Share of answers that are exactly right, over held-out documents; an example is an answer."""

    def __init__(self, setting: Setting, blocks: Blocks):
        (config, self._mesh, definition), self._blocks = setting.model, blocks
        self._batch_size, self._max_rows = config.global_batch_size, config.eval.max_rows
        answers = questions(blocks.spans("fact"), blocks.spans("answer"))
        self._answers = answers[answers["row"] < config.eval.max_rows]
        self._step = jax.jit(functools.partial(hits_at, definition), out_shardings=sharding.replicated(self._mesh))

    def run(self, params: Params) -> Result:
        """Computes the accuracy, and of every answer whether it is right, its depth and its distance.

        `depth` is 0 for the first fact of the context and 1 for the last; `distance` counts the tokens from the stated
        value to the answer; `num_facts` counts the facts of the document. The metric `chance` says what accuracy to
        expect of naming one of the document's values at random: the mean over the answers of 1 / num_facts. It is a
        property of the questions and has no interval.
        """
        size, seq_len, num_rows = self._batch_size, self._blocks.block_len - 1, min(self._max_rows, len(self._blocks))
        num_rows += -num_rows % size  # The last batch is filled up.
        at = answer_positions(self._answers, num_rows, seq_len)
        hits = [
            self._step(params, row, on_mesh(self._mesh, at[i * size : (i + 1) * size]))
            for i, row in enumerate(batches(self._blocks, self._mesh, size, self._max_rows))
        ]
        hits_NxT = np.zeros((num_rows, seq_len), bool)
        np.put_along_axis(hits_NxT, at, np.concatenate(jax.device_get(hits)), axis=1)
        correct = exact_matches(hits_NxT, self._answers)
        examples = [
            {"row": row, "correct": int(right), "depth": round(depth, 4), "distance": distance, "num_facts": num_facts}
            for right, (row, _, _, depth, distance, num_facts) in zip(correct, self._answers.tolist(), strict=True)
        ]
        accuracy = binomial_interval(int(correct.sum()), len(correct))
        chance = Interval(float(np.mean(1 / self._answers["num_facts"])), None, None)
        return Result({"accuracy": accuracy, "chance": chance}, examples)


def answer_positions(answers: np.ndarray, num_rows: int, seq_len: int) -> np.ndarray:
    """Finds the positions whose next token belongs to an answer.

    Args:
      answers: records with `row`, `start` (position in the block) and `length`.
      num_rows: R, blocks and the padding rows that fill up the last batch.
      seq_len: T.

    Returns:
      [R, N] int32, each row's in order; N is that of the row with most of them, others are filled up with positions
      that belong to no answer.
    """
    is_asked = np.zeros((num_rows, seq_len), bool)
    for row, start, length in answers[SPAN].tolist():
        is_asked[row, start - 1 : start - 1 + length] = True
    first_asked = np.argsort(~is_asked, axis=1, kind="stable").astype(np.int32)
    return first_asked[:, : is_asked.sum(axis=1).max(initial=0)]


def questions(facts: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Measures how deep in its document the fact is that an answer repeats, and how far away.

    Args:
      facts: `Blocks.spans("fact")`, the values where they are stated; its column `fact` numbers those of a document.
      answers: `Blocks.spans("answer")`, the values where they are asked for, with the `fact` that states each.

    Returns:
      [number of answers] of QUESTION_DTYPE: `row`, `start` and `length` of the answer; `depth` of its fact, 0 for the
      first of the document and 1 for the last; `distance` in tokens from the value's first one there to the answer's;
      `num_facts` of the document.
    """
    stated = {(fact["document"], fact["fact"]): int(fact["start"]) for fact in facts}
    num_facts = Counter(facts["document"].tolist())

    def question(a: np.void) -> tuple:
        num, distance = num_facts[a["document"]], a["start"] - stated[a["document"], a["fact"]]
        return a["row"], a["start"], a["length"], a["fact"] / max(num - 1, 1), distance, num

    return np.array([question(a) for a in answers], QUESTION_DTYPE)


def exact_matches(hits: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Checks whether every token of each answer is a hit.

    Args:
      hits: [N, T] bool; hits[n, t] says that the most likely token after position t of block n is the block's next one.
      answers: records with `row`, `start` (position in the block) and `length`.

    Returns:
      [number of answers] bool.
    """
    return np.array([hits[r, start - 1 : start - 1 + n].all() for r, start, n in answers[SPAN].tolist()], bool)


def hits_at(definition: Definition, params: Params, row: Row, at: jax.Array) -> jax.Array:
    """[B, N] bool: whether the most likely token after each of the positions `at` is the row's next one."""
    inputs = clean_inputs(row)
    logits = definition.apply(params, inputs.tokens, inputs.visibility, at_BN=at)
    return jnp.argmax(logits, axis=-1) == jnp.take_along_axis(inputs.targets, at, axis=1)
