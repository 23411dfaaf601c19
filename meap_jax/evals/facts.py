"""Looking facts up, by the number of facts, in generated documents.

They may have more facts, or more sentences between facts and questions, than any that was trained on. Every fact of a
document is asked for once. An answer counts as in `meap_jax.evals.retrieval`.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from meap_jax import sharding
from meap_jax.corpus.documents import Document, encode_documents
from meap_jax.corpus.retrieval import RetrievalSpec, document
from meap_jax.data.store import EncodedDocument
from meap_jax.errors import ConfigError
from meap_jax.evals.retrieval import answer_positions, exact_matches, hits_at
from meap_jax.evals.setting import Setting
from meap_jax.fields import numbers
from meap_jax.model.decoder import Definition, Params
from meap_jax.results import Interval, Result
from meap_jax.rows import Row
from meap_jax.statistics import binomial_interval
from meap_jax.tokenizers import Tokenizer

ROWS_AT_A_TIME = 8
ANSWER_DTYPE = np.dtype([
    ("row", "<i4"), ("start", "<i4"), ("length", "<i4"), ("num_facts", "<i4"), ("num_fillers", "<i4"),
    ("depth", "<f4"), ("distance", "<i4"),
])  # fmt: skip


class Kind(NamedTuple):
    """Documents of one kind."""

    num_facts: int
    num_fillers: int  # Sentences between facts and questions.
    num_documents: int


class FactSet(NamedTuple):
    """Documents in rows, and the places of their answers."""

    rows: Row  # tokens and segment_ids, [N, T + 1] numpy arrays.
    answers: np.ndarray  # [A] of ANSWER_DTYPE.
    at: np.ndarray  # [N, M] int32, from `answer_positions`.

    @property
    def chance(self) -> float:
        """The accuracy of naming one of the values of a document at random."""
        return float((1 / self.answers["num_facts"]).mean())

    def correct(self, hits: np.ndarray) -> np.ndarray:
        """Which answers are right, [A] bool, from the hits [N, M] at the positions `at`."""
        hits_NxT = np.zeros((len(hits), self.rows.tokens.shape[1] - 1), bool)
        np.put_along_axis(hits_NxT, self.at, np.asarray(hits), axis=1)
        return exact_matches(hits_NxT, self.answers)


def make_set(tokenizer: Tokenizer, kinds: Sequence[Kind], num_keys: int, num_values: int, seed: int) -> FactSet:
    """Generates documents and packs them, in their order, as many into each row as have room.

    Args:
      tokenizer: of the model.
      kinds: the documents; a row is as long as the longest of them.
      num_keys, num_values: as in data.retrieval.
      seed: of the documents; the same ones for the same arguments.
    """
    rows: list[list[tuple[Kind, EncodedDocument]]] = []
    encoded = [*zip(_kinds_of(kinds), _encoded(tokenizer, kinds, num_keys, num_values, seed), strict=True)]
    length = used = max(len(made.ids) for _, made in encoded)
    for kind, made in encoded:
        if used + len(made.ids) > length:
            rows.append([])
            used = 0
        rows[-1].append((kind, made))
        used += len(made.ids)

    num_rows = len(rows) + -len(rows) % ROWS_AT_A_TIME  # The last ones may be padding alone.
    tokens = np.full((num_rows, length), tokenizer.pad_id, np.int32)
    segment_ids = np.zeros((num_rows, length), np.int32)
    answers: list[tuple] = []
    for row, documents in enumerate(rows):
        end = 0
        for segment, (kind, made) in enumerate(documents, 1):
            start, end = end, end + len(made.ids)
            tokens[row, start:end], segment_ids[row, start:end] = made.ids, segment
            stated = {span.columns["fact"]: span.start for span in made.spans if span.role == "fact"}
            for span in (span for span in made.spans if span.role == "answer"):
                fact = span.columns["fact"]
                depth, distance = fact / max(kind.num_facts - 1, 1), span.start - stated[fact]
                answers.append((row, start + span.start, span.length, *kind[:2], depth, distance))
    of_set = np.array(answers, ANSWER_DTYPE)
    return FactSet(Row(tokens, segment_ids), of_set, answer_positions(of_set, num_rows, length - 1))


def _kinds_of(kinds: Sequence[Kind]) -> Iterator[Kind]:
    """The kind of each document."""
    return (kind for kind in kinds for _ in range(kind.num_documents))


def _encoded(
    tokenizer: Tokenizer, kinds: Sequence[Kind], num_keys: int, num_values: int, seed: int
) -> Iterator[EncodedDocument]:
    """The documents, each kind with a stream of its own, so that it does not depend on the others."""

    def made() -> Iterator[tuple[int, Document]]:
        for num_facts, num_fillers, num_documents in kinds:
            spec = RetrievalSpec(num_keys, num_values, num_facts, None, num_fillers, min_fillers=num_fillers)
            rng = np.random.Generator(np.random.PCG64((seed, num_facts, num_fillers)))
            yield from ((0, document(rng, spec)) for _ in range(num_documents))

    return (encoded for _, encoded in encode_documents(made(), tokenizer))


def hits(definition: Definition, params: Params, rows: Row, at: jax.Array) -> jax.Array:
    """[N, M] bool: whether the most likely token after each of the positions `at` is the row's next one."""

    def of_batch(batch: tuple[Row, jax.Array]) -> jax.Array:
        return hits_at(definition, params, *batch)

    batches = jax.tree.map(lambda x: x.reshape(-1, ROWS_AT_A_TIME, x.shape[1]), (rows, at))
    return jax.lax.map(of_batch, batches).reshape(at.shape)


def cells(examples: Sequence[Mapping[str, Any]]) -> list[dict[str, int]]:
    """Counts examples of `Facts` by number of facts and of fillers: how many are right, and how many there are."""
    counts: dict[tuple[int, int], list[int]] = {}
    for example in examples:
        cell = counts.setdefault((example["num_facts"], example["num_fillers"]), [0, 0])
        cell[0] += example["correct"]
        cell[1] += 1
    return [
        {"num_facts": num_facts, "num_fillers": num_fillers, "correct": correct, "asked": asked}
        for (num_facts, num_fillers), (correct, asked) in counts.items()
    ]


def make(setting: Setting) -> dict[str, "Facts"]:
    """Makes the evaluator of a model.

    Raises:
      ConfigError: for more facts than there are keys or values.
    """
    return {"facts": Facts(setting)}


class Facts:
    """Share of answers that are exactly right, by the number of facts; an example is an answer."""

    def __init__(self, setting: Setting):
        options, retrieval = setting.config.eval.facts, setting.config.data.retrieval
        self._counts, most = numbers(options.counts), min(retrieval.num_keys, retrieval.num_values)
        if max(self._counts) > most:
            raise ConfigError(
                f"eval.facts.counts is {options.counts!r}, but must be numbers up to {most}: data.retrieval has no "
                "more keys and values."
            )
        fillers = numbers(options.fillers)
        kinds = [Kind(count, num, options.documents) for count in self._counts for num in fillers]
        self._set = make_set(
            setting.tokenizer, kinds, retrieval.num_keys, retrieval.num_values, setting.config.eval.seed
        )
        self._mesh, definition = setting.model.mesh, setting.model.definition
        self._hits = jax.jit(functools.partial(hits, definition), out_shardings=sharding.replicated(self._mesh))

    def run(self, params: Params) -> Result:
        """Computes the accuracy for each number of facts, and beside it that of guessing; an example is an answer."""
        everywhere = sharding.replicated(self._mesh)
        rows, at = jax.tree.map(lambda x: sharding.put_whole(everywhere, x), (self._set.rows, self._set.at))
        correct = self._set.correct(jax.device_get(self._hits(params, rows, at)))
        answers = self._set.answers
        metrics = {}
        for count in self._counts:
            of_count = correct[answers["num_facts"] == count]
            metrics[f"{count}_facts"] = binomial_interval(int(of_count.sum()), len(of_count))
            metrics[f"{count}_facts/chance"] = Interval(1 / count, None, None)  # Of naming one of the values.
        columns = [name for name in ANSWER_DTYPE.names or () if name not in ("start", "length")]
        examples: list[dict[str, Any]] = [
            {"correct": int(is_right), **{name: round(answer[name].item(), 4) for name in columns}}
            for is_right, answer in zip(correct, answers, strict=True)
        ]
        return Result(metrics, examples)
