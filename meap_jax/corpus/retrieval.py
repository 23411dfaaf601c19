"""Generated English documents that state facts and ask for them later.

    The access code of the harbor is falcon. The access code of the museum is otter. It was late.
    Tell the museum otter. Tell the harbor falcon. Tell the museum otter.

Spans say where each value is stated and asked for, and where the keys are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from meap_jax.corpus.documents import Document, Span

# All wording. The value follows a fact or a question after one space, and _END follows the value. A question ends in
# its key, so that the token which must find the value is the key itself. Two small layers learn to look that up within
# a million tokens; with "What is the access code of the harbor?" they had not after three.
FACT = "The access code of the {key} is"
QUESTION = "Tell the {key}"
_END = "."

FILLERS = (
    "It was late.",
    "The sky was grey.",
    "Nobody said a word.",
    "The rain had stopped.",
    "A light was still on.",
    "The road was quiet.",
    "Somebody closed a door.",
    "The wind came from the north.",
    "There was time to wait.",
    "The clock had just struck.",
    "We took notes on paper.",
    "A letter lay on the table.",
    "The coffee was cold by then.",
    "They had walked all day.",
    "The list was long and dull.",
    "He read it once again.",
)

# Places and animals: single words, no word in both, so that a small BPE makes each one token.
KEYS = tuple(
    "harbor museum castle library station market temple bridge tower school office hotel church "
    "palace farm mill garden mine barn cabin studio gallery theater stadium airport factory bakery "
    "clinic prison court bank shop cafe inn lodge fort dock port pier ranch cellar attic kitchen "
    "chapel archive vault hangar depot shed stable yard arena college ferry tunnel dam plaza park "
    "camp villa tavern forge lab abbey".split()
)
VALUES = tuple(
    "falcon otter tiger eagle raven wolf bear lion horse camel zebra panda shark whale salmon "
    "trout rabbit lobster spider beetle moth cobra viper lizard turtle frog toad duck goose swan "
    "heron stork crow robin sparrow parrot finch hawk owl badger ferret weasel moose bison goat "
    "sheep donkey monkey gorilla lemur sloth beaver mouse hamster dolphin seal walrus penguin "
    "pigeon koala llama gecko crab lynx".split()
)


@dataclass(frozen=True)
class RetrievalSpec:
    """What documents are made of; the first num_keys keys and num_values values are used. `meap_jax.fields` has ranges.

    A document has min_facts to num_facts facts (min_facts None: always num_facts); the number f has a probability
    proportional to 1 / f^2. Short documents are a curriculum: where there are few facts to choose from, looking one
    up is learned early, and then carries over. Each of the questions, questions_per_fact * f of them and at least
    one, asks a fact drawn anew; with None, every fact is asked once, in an order that is drawn.
    """

    num_keys: int
    num_values: int
    num_facts: int
    questions_per_fact: float | None
    max_fillers: int
    min_facts: int | None = None
    min_fillers: int = 0


def generate(spec: RetrievalSpec, seed: int | Sequence[int], num_documents: int) -> Iterator[Document]:
    """Generates documents, the same ones for the same arguments on every machine.

    Args:
      spec: the counts.
      seed: a seed, or several numbers that make one seed together.
      num_documents: how many.

    Yields:
      Documents with a uniformly chosen number of fillers between facts and questions.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    for _ in range(num_documents):
        yield document(rng, spec)


def document(rng: np.random.Generator, spec: RetrievalSpec) -> Document:
    """Generates one document: facts, then fillers, then questions with their answers.

    Args:
      rng: where the draws come from.
      spec: the counts.

    Returns:
      The document. A span of role fact is the value where a fact states it, one of role answer the value where a
      question asks for it the first time, and one of role repeat where it is asked again, and could be read off the
      answer before. One of role key is the key, in facts and in questions. All hold the space in front, and a column
      `fact`: the number of the fact, 0 being stated first.
    """
    num_facts = _num_facts(rng, spec)
    asked = _asked(rng, spec, num_facts)
    keys = [KEYS[i] for i in _choose(rng, spec.num_keys, num_facts)]
    values = [VALUES[i] for i in _choose(rng, spec.num_values, num_facts)]
    num_fillers = spec.min_fillers + int(rng.random() * (spec.max_fillers - spec.min_fillers + 1))

    text, spans = "", []

    def say(sentence: str, fact: int, role: str) -> None:
        """A sentence about a fact, whose value has the role."""
        nonlocal text
        before, after = sentence.split(" {key}")
        text += f" {before}" if text else before
        for word, its_role, rest in ((keys[fact], "key", after), (values[fact], role, _END)):
            spans.append(Span(len(text), len(text) + 1 + len(word), its_role, {"fact": fact}))
            text += f" {word}{rest}"

    for fact in range(num_facts):
        say(FACT, fact, "fact")
    text += "".join(f" {FILLERS[int(draw * len(FILLERS))]}" for draw in rng.random(num_fillers))
    for i, fact in enumerate(asked):
        say(QUESTION, fact, "repeat" if fact in asked[:i] else "answer")
    return Document(text, tuple(spans))


def _num_facts(rng: np.random.Generator, spec: RetrievalSpec) -> int:
    """From min_facts to num_facts, with probability proportional to 1 / f^2."""
    counts = np.arange(spec.min_facts or spec.num_facts, spec.num_facts + 1)
    cumulative = np.cumsum(1 / counts**2)
    return int(counts[np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")])


def _asked(rng: np.random.Generator, spec: RetrievalSpec, num_facts: int) -> list[int]:
    if spec.questions_per_fact is None:
        return _choose(rng, num_facts, num_facts)
    num_questions = max(1, int(spec.questions_per_fact * num_facts))
    return [int(draw * num_facts) for draw in rng.random(num_questions)]


def _choose(rng: np.random.Generator, num: int, count: int) -> list[int]:
    """`count` distinct indices below `num`, from uniform doubles alone.

    NumPy may change the streams of choice and permutation between releases.
    """
    return np.argsort(rng.random(num), kind="stable")[:count].tolist()
