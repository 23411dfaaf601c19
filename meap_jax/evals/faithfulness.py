"""How much of an output stands in its source: shares of n-grams and of numbers, without any judge.

A low share says that a model wrote what it did not read, which may still be true; a high one that it copied, which is
faithful, though it may be no summary. For n-grams it is one minus the share of novel ones in See, Liu and Manning, Get
To The Point (2017).
"""

import re

from meap_jax.evals.rouge import ngrams, words

# With commas between groups of three digits, 1,234,567, or without; decimals after a point.
_NUMBER = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")


def ngrams_in_source(output: str, source: str, n: int) -> float | None:
    """The share of the distinct n-grams of words of the output that the source has; None if the output has none.

    Distinct, so that a model that repeats one sentence is measured by that sentence once.
    """
    found = set(ngrams(words(output), n))
    return len(found & set(ngrams(words(source), n))) / len(found) if found else None


def numbers_in_source(output: str, source: str) -> float | None:
    """The share of the distinct numbers of the output that the source has; None if the output has none."""
    found = numbers_of(output)
    return len(found & numbers_of(source)) / len(found) if found else None


def numbers_of(text: str) -> set[str]:
    """The numbers of a text in digits, without commas between thousands; those written as words don't count."""
    return {number.replace(",", "") for number in _NUMBER.findall(text)}
