"""Evaluators that ask a model questions: prompts are continued greedily, and what comes is scored.

A *task* makes its questions, scores an output, and makes metrics of all records. Everything else is here: batches,
prompts that begin alike, predictions on disk, and what is already there after an interruption.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from meap_jax.evals.predictions import Predictions, Record, prompt_hash
from meap_jax.evals.setting import Setting
from meap_jax.generator import Generator
from meap_jax.model.decoder import Params
from meap_jax.results import Interval, Result

_log = logging.getLogger(__name__)
BATCHES_A_SAVE = 4  # A kill loses so many at most.


class Question(NamedTuple):
    """A prompt, and what is known of it."""

    tokens: list[int]
    golds: tuple[str, ...]
    about: Mapping[str, Any]  # What its record says besides, of JSON's types; together unique within the task.
    shares: str | None = None  # Questions of the same name begin alike; the first of them shares most with the others.


class Task(Protocol):
    """What a task is, apart from models."""

    name: str  # Of its metrics and its file of predictions.
    max_new_tokens: int
    stop_strings: tuple[str, ...]

    def questions(self, setting: Setting) -> Sequence[Question]:
        """All questions, the same for the same options and tokenizer."""

    def score(self, output: str, question: Question) -> dict[str, float]:
        """The scores of an output, each in [0, 1]."""

    def metrics(self, records: Sequence[Record]) -> dict[str, Interval]:
        """Metrics of all records that have scores."""


class Prompting:
    """An evaluator that runs a task; an example is a question."""

    def __init__(self, setting: Setting, task: Task):
        self._setting, self.task = setting, task
        self._questions: Sequence[Question] | None = None

    def run(self, params: Params) -> Result:
        """Continues the prompts that have no prediction yet; returns the metrics and a record for each question.

        A prompt that has no room in the model's context is not asked: its record has `too_long` and no scores.
        """
        setting, task = self._setting, self.task
        if self._questions is None:
            self._questions = task.questions(setting)
        keys = [
            prompt_hash(q.tokens, max_new_tokens=task.max_new_tokens, stop=list(task.stop_strings))
            for q in self._questions
        ]
        is_first = jax.process_index() == 0
        file = setting.folder / f"{task.name}.jsonl" if setting.folder is not None and is_first else None
        predictions = Predictions(file, task.name, setting.fingerprint)
        is_known = everywhere(np.array([key in predictions.records for key in keys], bool))
        room = setting.seq_len - task.max_new_tokens
        fits = np.array([len(q.tokens) <= room for q in self._questions], bool)
        asked = np.flatnonzero(~is_known & fits)
        if is_known.any():
            _log.info("%s: %d of %d answers are there already", task.name, is_known.sum(), len(keys))
        if len(asked):
            with setting.generator(params) as generator:
                for batch in self._answers(generator, self._questions, asked.tolist()):
                    predictions.add(self._record(keys[i], self._questions[i], output) for i, output in batch)
        outputs = [predictions.records[key]["output"] if key in predictions.records else None for key in keys]
        # Scored again, also what was there: a rule may have changed since.
        answered = zip(keys, self._questions, outputs, strict=True)
        records = [self._record(key, question, output) for key, question, output in answered]
        scored = [record for record in records if "scores" in record]
        metrics = task.metrics(scored) if scored else {}
        if num_long := len(records) - len(scored):
            _log.warning("%s: %d of %d prompts are too long for %d tokens and were not asked", task.name, num_long,
                         len(keys), setting.seq_len)  # fmt: skip
        return Result(metrics | {"too_long": Interval(float(num_long), None, None)}, records)

    def _record(self, key: str, question: Question, output: str | None) -> Record:
        record: Record = {"prompt": key, **question.about, "golds": list(question.golds)}
        if output is None:
            return record | {"too_long": True}
        return record | {"output": output, "scores": self.task.score(output, question)}

    def _answers(
        self, generator: Generator, questions: Sequence[Question], asked: Sequence[int]
    ) -> Iterator[list[tuple[int, str]]]:
        """Yields (number of a question, output) for all that are asked, a save's worth at a time."""
        options: dict[str, Any] = dict(max_new_tokens=self.task.max_new_tokens, stop_strings=self.task.stop_strings)
        size = self._setting.config.eval.batch_size
        alike, alone = defaultdict(list), []
        for i in asked:
            name = questions[i].shares
            alone.append(i) if name is None else alike[name].append(i)
        # Families of as many members: row i of each batch is a member of family i.
        by_count = defaultdict(list)
        for members in alike.values():
            by_count[len(members)].append(members)
        for families in by_count.values():
            for start in range(0, len(families), size):
                batches = list(zip(*families[start : start + size], strict=True))
                prompts = [[questions[i].tokens for i in batch] for batch in batches]
                for row, found in zip(batches, generator.generate_sharing(prompts, **options), strict=True):
                    yield [(i, completion.text) for i, completion in zip(row, found, strict=True)]
        alone.sort(key=lambda i: len(questions[i].tokens))
        for start in range(0, len(alone), size * BATCHES_A_SAVE):
            batch = alone[start : start + size * BATCHES_A_SAVE]
            found = generator.generate([questions[i].tokens for i in batch], **options)
            yield [(i, completion.text) for i, completion in zip(batch, found, strict=True)]


def everywhere(on_first_host: np.ndarray) -> np.ndarray:
    """The array of the first host, on all of them."""
    if jax.process_count() == 1:
        return on_first_host
    return np.asarray(multihost_utils.broadcast_one_to_all(on_first_host))
