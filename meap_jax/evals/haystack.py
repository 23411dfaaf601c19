"""Long contexts: text in sentences, cut to a number of tokens, with sentences of one's own put into it."""

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from meap_jax.corpus.stdlib import read_stdlib
from meap_jax.errors import ConfigError, DataError
from meap_jax.evals.setting import Setting
from meap_jax.readers import Skips, open_corpus
from meap_jax.tokenizers import Tokenizer

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+|\n\s*\n")
_CHARACTERS_A_TOKEN = 8  # More than any usual tokenizer has in English.


class Haystack(NamedTuple):
    """A text, and where its sentences end."""

    text: str  # With its beginning once more behind its end, so that a context can begin anywhere.
    ends: np.ndarray  # [N] int64, in characters, blank space behind the sentence included; 0 is the first.
    tokens: np.ndarray  # [N] int64, tokens in front of each end, in the text as a whole.
    size: int  # Of the text itself, in characters.
    version: str  # The beginning of the text's SHA-256: results on other texts are not compared.

    def context(self, trial: int, num_trials: int, num_tokens: int) -> "Context":
        """About `num_tokens` tokens at most, from a place on that depends on the trial: trials spread over the text."""
        first = int(np.searchsorted(self.ends, self.size * trial // num_trials))
        last = int(np.searchsorted(self.tokens, self.tokens[first] + max(num_tokens, 0), side="right")) - 1
        return self.between(first, max(first, last))

    def between(self, first: int, last: int) -> "Context":
        """The sentences between two ends."""
        begin, ends = int(self.ends[first]), self.ends[first : last + 1]
        tokens = self.tokens[first : last + 1] - self.tokens[first]
        return Context(self.text[begin : ends[-1]], ends - begin, tokens, first, last)


class Context(NamedTuple):
    """A part of a haystack."""

    text: str
    ends: np.ndarray  # [n] int64: places in it where a sentence ends, from 0 to its length.
    tokens: np.ndarray  # [n] int64: in front of each place.
    first: int  # Of the haystack's ends, as is `last`.
    last: int

    def with_sentences(self, sentences: Sequence[tuple[str, float]]) -> str:
        """The text with sentences in it, each at the last end that has at most its share of the tokens in front.

        Args:
          sentences: each with its share, in [0, 1]; 0 is the beginning. Those at one place keep their order.
        """
        shares = [share * self.tokens[-1] for _, share in sentences]
        places = [int(self.ends[np.searchsorted(self.tokens, share, side="right") - 1]) for share in shares]
        parts, before = [], 0
        for i in sorted(range(len(sentences)), key=lambda i: places[i]):
            parts += [self.text[before : places[i]], sentences[i][0], " "]
            before = places[i]
        return "".join([*parts, self.text[before:]]).strip()


def open_haystack(setting: Setting, longest: int, num_trials: int) -> Haystack:
    """Reads the text of `eval.niah.haystack` and finds its sentences.

    Args:
      setting: with the tokenizer.
      longest: tokens of the longest context.
      num_trials: contexts that begin at different places; no more text is read than they need.

    Raises:
      DataError: the files hold no text.
    """
    path, most = setting.config.eval.niah.haystack, _CHARACTERS_A_TOKEN * longest * num_trials
    texts = [_documentation()] if path is None else []
    if path is not None:
        corpus, skips, size = open_corpus(path), Skips(1_000), 0
        for text in (text for part in corpus.parts() for text in corpus.read(part, skips)):
            texts.append(text)
            size += len(text)
            if size > most:
                break
    text = "\n\n".join(text.strip() for text in texts)[:most]
    return make_haystack(text, setting.tokenizer, longest, str(path))


@functools.cache
def _documentation() -> str:
    """Python's documentation in one text; to find it takes seconds."""
    return "\n\n".join(read_stdlib())


def make_haystack(text: str, tokenizer: Tokenizer, longest: int, name: str = "the text") -> Haystack:
    """Finds the sentences of a text, which is repeated where it is shorter than the longest context.

    Raises:
      DataError: it is blank.
    """
    text = text.strip() + "\n\n"
    [(_, offsets)] = tokenizer.encode_with_offsets([text])
    found = [match.end() for match in _SENTENCE_END.finditer(text)]
    ends = np.unique(np.array([*found, len(text)], np.int64))
    tokens = np.searchsorted(offsets[:, 1], ends, side="right").astype(np.int64)
    if not text.strip() or not tokens[-1]:
        raise DataError(f"eval.niah.haystack is {name}, which holds no text.")
    shifts = np.arange(1 + -(-longest // int(tokens[-1])), dtype=np.int64)[:, None]
    all_ends, all_tokens = (ends + shifts * len(text)).reshape(-1), (tokens + shifts * tokens[-1]).reshape(-1)
    version = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return Haystack(text * len(shifts), np.append(0, all_ends), np.append(0, all_tokens), len(text), version)


def largest_that_fits(count: Callable[[int], int], limit: int, guess: int) -> int:
    """The largest n from 0 on for which `count(n)`, which grows with n, is at most `limit`; -1 if there is none.

    Looks near a guess that the average of what it saw corrects, so that few counts are made.
    """
    low, high, n = -1, None, max(guess, 0)  # count(low) fits, count(high) doesn't.
    while high is None or high - low > 1:
        size = count(n)
        if size <= limit:
            low = n
        else:
            high = n
        per_item = max(size / max(n, 1), 1e-9)
        step = int((limit - size) / per_item)
        n = n + step if step else n + (1 if size <= limit else -1)
        n = max(low + 1, n)
        if high is not None:
            n = min(n, high - 1)
    return low


def read_prompt(path: str | None, default: str, names: Sequence[str], field: str) -> str:
    """The prompt in a file, which must have each of the names in braces; `default` where no file is named.

    Raises:
      ConfigError: it can't be read, or lacks a name.
    """
    if path is None:
        return default
    try:
        with open(path, encoding="utf-8") as file:
            prompt = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field} is {path}, which can't be read ({error}).") from error
    for name in names:
        if f"{{{name}}}" not in prompt:
            raise ConfigError(f"{field} is {path}, which has no {{{name}}}: it must have {', '.join(names)} in braces.")
    return prompt


def filled(prompt: str, **values: str) -> str:
    """A prompt with values in place of their names in braces; other braces stay."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), prompt)
