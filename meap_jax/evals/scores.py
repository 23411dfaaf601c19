"""Scoring rules of published evaluations, each a function of an output and its gold answers.

All are in [0, 1]. Where a rule has a source, it gives what the source's code gives, oddities included.
"""

import re
import string
from collections.abc import Mapping, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CONTROL = re.compile(r"[\x00-\x1f]")
_WORD = re.compile(r"[^\W_]+")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


def squad_normalized(text: str) -> str:
    """A text as SQuAD's evaluation compares it: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def first_line(output: str) -> str:
    """What stands before the first newline, without outer blank space; nothing, where a newline comes first."""
    return output.split("\n")[0].strip()


def best_subspan_em(output: str, golds: Sequence[str]) -> float:
    """1 if any gold answer is part of the first line, both SQuAD-normalized.

    lost-in-the-middle, scripts/evaluate_qa_responses.py. The first line alone counts, since a model that copies its
    context would copy the answer. A gold that normalizes to nothing, such as "The", is part of everything.
    """
    found = squad_normalized(first_line(output))
    return float(any(squad_normalized(gold) in found for gold in golds))


def contains(output: str, gold: str) -> float:
    """1 if the gold is part of the whole output, in any case; lost-in-the-middle's rule for key-value retrieval."""
    return float(gold.lower() in output.lower())


def _ruler_cleaned(output: str) -> str:
    """An output as RULER's scorers see it: control characters are newlines, outer blank space is gone."""
    return _CONTROL.sub("\n", output.strip()).strip()


def string_match_all(output: str, golds: Sequence[str]) -> float:
    """The share of the golds that are part of the output, in any case; RULER, scripts/eval/synthetic/constants.py."""
    found = _ruler_cleaned(output).lower()
    return sum(gold.lower() in found for gold in golds) / len(golds)


def string_match_part(output: str, golds: Sequence[str]) -> float:
    """1 if any gold is part of the output, in any case; RULER, as above (lm-eval 0.4.13 averages over golds)."""
    found = _ruler_cleaned(output).lower()
    return float(any(gold.lower() in found for gold in golds))


def rouge1_recall(output: str, gold: str) -> float:
    """The share of the distinct words of the gold that the output has.

    Words are runs of letters and digits in lower case. The cells of the paper's Figure 3 are such shares, k / 11.
    """
    words = set(_WORD.findall(gold.lower()))
    return len(words & set(_WORD.findall(output.lower()))) / len(words)


def exact_match(output: str, gold: str) -> float:
    """1 if the first sentence of the first line that isn't blank is the gold, both SQuAD-normalized.

    A model without a chat's training does not stop after an answer; what it writes behind the sentence doesn't count.
    """
    line = first_line(output.strip())
    end = _SENTENCE_END.search(line)
    return float(squad_normalized(line[: end.end()] if end else line) == squad_normalized(gold))


def word_share(output: str, gold: str) -> float:
    """The share of the words of the gold that are part of the output, in lower case.

    OpenCompass, datasets/needlebench/multi.py, whose score is 100 times this. Words are what stands between blanks,
    punctuation included; one that comes twice counts twice.
    """
    words = gold.lower().split()
    return sum(word in output.lower() for word in words) / len(words)


def effective_length(means: Mapping[int, float], share: float = 0.85) -> int:
    """The longest length up to which every length keeps this share of the score at the shortest; NoLiMa's measure.

    0 where the score at the shortest is 0: nothing can be kept.
    """
    base, effective = means[min(means)], 0
    for length in sorted(means):
        if base <= 0 or means[length] < share * base:
            break
        effective = length
    return effective
