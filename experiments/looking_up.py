"""What `experiments.fine_tuning` trains on and asks: texts, an instruction set, and questions for `mdqa`.

    Document [1](Title: Note) The access code of the harbor is falcon.
    Document [2](Title: Note) The access code of the museum is otter.

    Tell the museum otter. Tell the harbor falcon.

Contexts are written by the function that writes them for the evaluation `mdqa`.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from meap_jax.corpus.retrieval import FACT, KEYS, QUESTION, VALUES
from meap_jax.errors import ConfigError
from meap_jax.evals.mdqa import Document, shown

NUM_WORDS = 16  # Keys, and values, that are used.
QUESTIONS_PER_FACT = 4  # Of a text. With 2, looking up was learned twice as late, or not within 1,500 steps.
PROMPT = "{search_results}\n\n{question}"  # As the template writes an instruction behind its input.
_TITLE = "Note"


class Fact(NamedTuple):
    """A key and its value, such as harbor and falcon."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        """What states it."""
        return f"{FACT.format(key=self.key)} {self.value}."

    @property
    def question(self) -> str:
        """What asks for it."""
        return QUESTION.format(key=self.key)


def draw_facts(rng: np.random.Generator, count: int) -> list[Fact]:
    """Draws facts with different keys and different values."""
    keys, values = (np.argsort(rng.random(NUM_WORDS), kind="stable")[:count] for _ in range(2))
    return [Fact(KEYS[key], VALUES[value]) for key, value in zip(keys, values, strict=True)]


def context_of(facts: list[Fact]) -> str:
    """A context of a document for each fact."""
    return shown([Document(_TITLE, fact.sentence, False) for fact in facts])


def text(rng: np.random.Generator, min_facts: int, max_facts: int) -> dict[str, str]:
    """A record to pre-train on: a context, and questions with their answers, some of them more than once.

    Short contexts prevail, f facts with a probability proportional to 1 / f^2: looking up is learned from these first.
    """
    counts = np.arange(min_facts, max_facts + 1)
    shares = np.cumsum(1 / counts**2)
    facts = draw_facts(rng, int(counts[np.searchsorted(shares, rng.random() * shares[-1], side="right")]))
    asked = [facts[int(draw * len(facts))] for draw in rng.random(QUESTIONS_PER_FACT * len(facts))]
    return {"text": f"{context_of(facts)}\n\n" + " ".join(f"{fact.question} {fact.value}." for fact in asked)}


def sample(rng: np.random.Generator, min_facts: int, max_facts: int) -> dict[str, str]:
    """A record of the instruction set, in Alpaca's form; the answer goes on about all facts that were not asked for.

    The value has a line of its own, the first one: `mdqa` scores no other.
    """
    facts = draw_facts(rng, min_facts + int(rng.random() * (max_facts - min_facts + 1)))
    asked = facts[int(rng.random() * len(facts))]
    others = " ".join(fact.sentence for fact in facts if fact is not asked)
    return {"instruction": asked.question, "input": context_of(facts), "output": f"{asked.value}.\n{others}"}


def question(rng: np.random.Generator, num_facts: int, position: int) -> dict[str, Any]:
    """A record of a file that `mdqa` reads; `position` is that of the document with the answer, from 0."""
    facts = draw_facts(rng, num_facts)
    contexts = [{"title": _TITLE, "text": fact.sentence, "isgold": i == position} for i, fact in enumerate(facts)]
    return {"question": facts[position].question, "answers": [facts[position].value], "ctxs": contexts}


# --------------------------------------------------------------------------------------------------------------- files


class Sizes(NamedTuple):
    """How much is written, trained and asked."""

    pretrain_steps: int
    texts: int  # To pre-train on.
    samples: int  # Of the instruction set.
    documents: tuple[int, ...]  # Of the contexts of questions; the first is the largest number that is trained on.
    questions: int  # For each number of documents.


class Files(NamedTuple):
    """What the experiment writes for its runs to read."""

    texts: Path
    instructions: Path
    questions: dict[int, Path]  # By the number of documents.
    prompt: Path


def write_files(folder: Path, sizes: Sizes, seed: int) -> Files:
    """Writes texts, instruction set and questions, the same for the same arguments.

    Raises:
      ConfigError: what was trained on before is something else.
    """
    most = sizes.documents[0]
    folder.mkdir(parents=True, exist_ok=True)
    files = Files(
        folder / "texts.jsonl",
        folder / "instructions.json",
        {n: folder / f"questions_{n}.jsonl" for n in sizes.documents},
        folder / "prompt.txt",
    )

    def lines(records: list[dict[str, Any]]) -> str:
        return "".join(json.dumps(record) + "\n" for record in records)

    rng = np.random.default_rng((seed, 0))
    _write_once(files.texts, lines([text(rng, 2, most) for _ in range(sizes.texts)]))
    rng = np.random.default_rng((seed, 1))
    samples = [sample(rng, max(2, most - 2), most) for _ in range(sizes.samples)]
    _write_once(files.instructions, json.dumps(samples, indent=1))
    for stream, (n, file) in enumerate(files.questions.items(), 2):
        rng = np.random.default_rng((seed, stream))
        file.write_text(lines([question(rng, n, i % n) for i in range(sizes.questions)]))
    files.prompt.write_text(PROMPT)
    return files


def _write_once(file: Path, content: str) -> None:
    """Writes a file that data is prepared from: what was prepared would not follow a change."""
    if file.exists() and file.read_text() != content:
        raise ConfigError(
            f"{file} was written with other values of --texts, --samples, --documents or data.seed: use those, or "
            "another --workdir."
        )
    file.write_text(content)
