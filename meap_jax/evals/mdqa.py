"""Multi-document question answering (the paper's Tables 3, 7, 8 and 9): one of k documents has the answer.

Reads lost-in-the-middle's files as they are. A file of k documents a question is asked as it stands. From the oracle
file, which has the gold document alone, contexts of k documents are built with the gold one at any position: the others
are gold documents of other questions that hold none of this one's answers. Those are drawn and not retrieved, and so
easier to tell apart; such results are named `drawn` and must not be set beside published ones.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from meap_jax.errors import ConfigError, DataError
from meap_jax.evals import scores
from meap_jax.evals.haystack import filled, read_prompt
from meap_jax.evals.predictions import Record
from meap_jax.evals.prompting import Prompting, Question
from meap_jax.evals.setting import Setting
from meap_jax.fields import numbers
from meap_jax.readers.objects import read_lines, text_of
from meap_jax.results import Interval
from meap_jax.statistics import binomial_interval, clustered_interval

PROMPT = (
    "Answer the question from the documents below. Some of them do not help.\n\n"
    "{search_results}\n\nQuestion: {question}\nAnswer:"
)
CLOSED_BOOK_PROMPT = "Question: {question}\nAnswer:"
_TRIES = 10_000  # Draws of a document that may hold an answer, before there seem to be none without.


class Document(NamedTuple):
    """A document of a context."""

    title: str
    text: str
    is_gold: bool


class Asked(NamedTuple):
    """A question of the file."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]


def make(setting: Setting) -> dict[str, Prompting]:
    """Makes the evaluator that `eval.mdqa.*` describes.

    Raises:
      ConfigError: no file is named.
    """
    if setting.config.eval.mdqa.path is None:
        raise ConfigError(
            "eval.mdqa.path is not set: name a .jsonl or .jsonl.gz of lost-in-the-middle, such as "
            "nq-open-oracle.jsonl.gz."
        )
    return {"mdqa": Prompting(setting, MultiDocumentQA())}


class MultiDocumentQA:
    """The task; a cell is a position of the gold document, from 1."""

    name, max_new_tokens = "mdqa", 100
    stop_strings: tuple[str, ...] = ("\n",)  # The first line alone is scored.

    def questions(self, setting: Setting) -> list[Question]:
        """One for each question of the file and position."""
        options = setting.config.eval.mdqa
        names = ("question",) if options.mode == "closed_book" else ("search_results", "question")
        prompt = read_prompt(
            options.prompt, CLOSED_BOOK_PROMPT if len(names) == 1 else PROMPT, names, "eval.mdqa.prompt"
        )
        asked = read_questions(Path(options.path))
        asked, pool = asked[: options.max_questions or None], asked
        contexts = self._contexts(setting, asked, pool)
        return [
            Question(
                setting.encode(filled(prompt, question=q.question, search_results=shown(documents))),
                q.answers,
                {"question": i, **about},
            )
            for i, (q, of_question) in enumerate(zip(asked, contexts, strict=True))
            for about, documents in of_question
        ]

    def _contexts(
        self, setting: Setting, asked: Sequence[Asked], pool: Sequence[Asked]
    ) -> list[list[tuple[dict[str, Any], Sequence[Document]]]]:
        """Of each question the contexts in which it is asked, each with what its records say of it."""
        options = setting.config.eval.mdqa
        if options.mode == "closed_book":
            return [[({"kind": "closed_book"}, ())] for _ in asked]
        if options.mode == "oracle":
            return [[({"kind": "oracle"}, [gold_of(q)])] for q in asked]
        if any(len(q.documents) > 1 for q in asked):
            return [
                [({"kind": f"file_{len(q.documents)}", "position": 1 + gold_position(q)}, q.documents)] for q in asked
            ]
        k, positions = options.num_documents, sorted(numbers(options.positions))
        if positions[-1] > k:
            raise ConfigError(
                f"eval.mdqa.positions is {options.positions}, but must be at most eval.mdqa.num_documents ({k})."
            )
        rng = np.random.default_rng(setting.config.eval.seed)
        golds = [gold_of(q) for q in pool]
        contexts: list[list[tuple[dict[str, Any], Sequence[Document]]]] = []
        for i, q in enumerate(asked):
            others = draw_distractors(i, q, golds, k - 1, rng)
            contexts.append(
                [
                    (
                        {"kind": f"drawn_{k}", "position": p},
                        [*others[: p - 1], gold_of(q), *others[p - 1 :]],
                    )
                    for p in positions
                ]
            )
        return contexts

    def score(self, output: str, question: Question) -> dict[str, float]:
        """lost-in-the-middle's accuracy."""
        return {"best_subspan_em": scores.best_subspan_em(output, question.golds)}

    def metrics(self, records: Sequence[Record]) -> dict[str, Interval]:
        """Accuracy over all, whose questions are the independent units, and at each position of the gold document."""
        return by_position(records, "best_subspan_em", prefix=f"{records[0]['kind']}/")


def by_position(records: Sequence[Record], score: str, prefix: str = "") -> dict[str, Interval]:
    """The mean of a score, over all records and of each `position`; names begin with a prefix."""
    values = [record["scores"][score] for record in records]
    found = {f"{prefix}{score}": clustered_interval(values, [record["question"] for record in records])}
    for position in sorted({record["position"] for record in records if "position" in record}):
        own = [record["scores"][score] for record in records if record["position"] == position]
        found[f"{prefix}{score}/position_{position}"] = binomial_interval(sum(own), len(own))
    return found


def shown(documents: Sequence[Document]) -> str:
    """Documents as lost-in-the-middle writes them into a prompt: number, title, text, a line each."""
    return "\n".join(f"Document [{i}](Title: {d.title}) {d.text}" for i, d in enumerate(documents, start=1))


def gold_of(asked: Asked) -> Document:
    """The gold document of a question."""
    return asked.documents[gold_position(asked)]


def gold_position(asked: Asked) -> int:
    """Its place among the documents, from 0."""
    return next(i for i, document in enumerate(asked.documents) if document.is_gold)


def draw_distractors(
    number: int, asked: Asked, golds: Sequence[Document], count: int, rng: np.random.Generator
) -> list[Document]:
    """Draws different documents, none of which holds an answer to the question.

    Raises:
      DataError: there are not so many.
    """
    answers = [answer for answer in map(scores.squad_normalized, asked.answers) if answer]
    own, drawn = gold_of(asked), dict[Document, None]()
    for index in rng.integers(len(golds), size=_TRIES):
        if len(drawn) == count:
            break
        document = golds[index]
        text = scores.squad_normalized(f"{document.title} {document.text}")
        if document != own and not any(answer in text for answer in answers):
            drawn[document] = None
    if len(drawn) < count:
        raise DataError(
            f"question {number + 1} ({asked.question!r}) needs {count} other documents without an answer, but "
            f"{len(drawn)} were found: lower eval.mdqa.num_documents, or bring more questions."
        )
    return list(drawn)


def read_questions(file: Path) -> list[Asked]:
    """Reads a file of lost-in-the-middle.

    Raises:
      DataError: naming file, line and field.
    """
    found = []
    for place, record in read_lines(file, field="eval.mdqa.path"):
        answers = record.get("answers")
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise DataError(f"{place} has no list of texts in the field 'answers'.")
        contexts = record.get("ctxs")
        if not isinstance(contexts, list) or not all(isinstance(context, Mapping) for context in contexts):
            raise DataError(f"{place} has no list of objects in the field 'ctxs'.")
        documents = tuple(
            Document(text_of(c, "title", place), text_of(c, "text", place), c.get("isgold") is True)
            for c in map(dict, contexts)
        )
        if sum(document.is_gold for document in documents) != 1:
            raise DataError(f"{place} must have one document in 'ctxs' with 'isgold': true.")
        found.append(Asked(text_of(record, "question", place), tuple(answers), documents))
    return found
