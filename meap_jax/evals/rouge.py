"""ROUGE-1, ROUGE-2 and ROUGE-L of an output against one reference, as the package rouge_score computes them.

Lin, ROUGE: A Package for Automatic Evaluation of Summaries (2004). Words are runs of a-z and 0-9 in lower case, without
stemming (`use_stemmer=False`); for ROUGE-L each of the two texts is one sequence (`rougeL`, not `rougeLsum`).
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

_WORD = re.compile(r"[a-z0-9]+")


class Overlap(NamedTuple):
    """What two texts share, in [0, 1]; both are 0 where one of the texts has no such unit."""

    recall: float  # Of the reference's units.
    f1: float  # The harmonic mean of recall and precision.


def words(text: str) -> list[str]:
    """The words of a text, as rouge_score's default tokenizer finds them; letters with accents part words."""
    return _WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n words, in order, repeated ones too."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def rouge_n(output: Sequence[str], reference: Sequence[str], n: int) -> Overlap:
    """The overlap in n-grams; one that a text has k times counts k times at most."""
    ours, theirs = Counter(ngrams(output, n)), Counter(ngrams(reference, n))
    return _overlap((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(output: Sequence[str], reference: Sequence[str]) -> Overlap:
    """The overlap in the longest common subsequence of words, in O(len(output) * len(reference))."""
    lengths = [0] * (len(reference) + 1)  # Of the longest one with each beginning of the reference.
    for word in output:
        diagonal = 0
        for i, other in enumerate(reference, start=1):
            above = lengths[i]
            lengths[i] = diagonal + 1 if word == other else max(above, lengths[i - 1])
            diagonal = above
    return _overlap(lengths[-1], len(output), len(reference))


def _overlap(common: int, num_output: int, num_reference: int) -> Overlap:
    if not common:
        return Overlap(0.0, 0.0)
    return Overlap(common / num_reference, 2 * common / (num_output + num_reference))
