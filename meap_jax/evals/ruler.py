"""RULER's tasks that need no download (Hsieh et al., 2024): needles in noise or among needles, variables, words.

Five more put needles into a text, `eval.niah.haystack`. Sizes are those of RULER's scripts/synthetic.yaml; wording is
ours, unless `eval.ruler.prompts` brings other prompts. A prompt's length includes the room for its answer.
"""

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from meap_jax.corpus.retrieval import KEYS, VALUES
from meap_jax.errors import ConfigError, DataError
from meap_jax.evals import scores
from meap_jax.evals.haystack import Haystack, filled, largest_that_fits, open_haystack
from meap_jax.evals.niah import check_lengths
from meap_jax.evals.predictions import Record
from meap_jax.evals.prompting import Prompting, Question
from meap_jax.evals.setting import Setting
from meap_jax.fields import numbers
from meap_jax.files import check_is_file, parse_json
from meap_jax.results import Interval
from meap_jax.statistics import binomial_interval

NOISE = "The grass kept growing. The clouds went by. It was an ordinary day. Then it was evening, and morning again."
_NIAH = (
    "Some special {kind} are hidden in the text below. Remember them, for they will be asked for.\n\n{context}\n\n"
    "What are all the special {kind} for {query} in the text above? The special {kind} for {query} in the text are"
)
PROMPTS = {
    "niah": _NIAH,
    "vt": "Follow the variables that are set in the text below.\n\n{context}\n\nQuestion: Which variables have the "
    "value {query} in the text above? Answer: These variables have the value {query}:",
    "cwe": "Here is a numbered list of words. Some words come more often than others; remember the ten that come most "
    "often.\n\n{context}\n\nQuestion: Which ten words come most often in the list above? Answer: The ten words are:",
    "fwe": "Here is a text of coded words. Find the three words that come most often, and leave out the dots.\n\n"
    "{context}\n\nQuestion: Which three coded words come most often in the text above? Answer: The three words are:",
}


class NiahSize(NamedTuple):
    """What a needle task is made of."""

    haystack: str  # noise, needles or text.
    keys: str  # words or uuids; those of `values` may be numbers too.
    values: str
    num_keys: int = 1  # Needles of different keys, the asked ones included.
    num_values: int = 1  # Needles of the same key.
    num_queries: int = 1  # Keys that are asked for.


NIAH = {
    "niah_single_1": NiahSize("noise", "words", "numbers"),
    "niah_single_2": NiahSize("text", "words", "numbers"),
    "niah_single_3": NiahSize("text", "words", "uuids"),
    "niah_multikey_1": NiahSize("text", "words", "numbers", num_keys=4),
    "niah_multikey_2": NiahSize("needles", "words", "numbers"),
    "niah_multikey_3": NiahSize("needles", "uuids", "uuids"),
    "niah_multivalue": NiahSize("text", "words", "numbers", num_values=4),
    "niah_multiquery": NiahSize("text", "words", "numbers", num_keys=4, num_queries=4),
}
MAX_NEW_TOKENS = dict.fromkeys(NIAH, 128) | {"vt": 30, "cwe": 120, "fwe": 50}
NUM_HOPS = 4  # Of vt: five variables have the value.
NUM_COMMON, COMMON_TIMES, UNCOMMON_TIMES = 10, 30, 3  # Of cwe.
ZETA, CODED_LENGTH = 2.0, 6  # Of fwe: the word of rank k comes about k^-ZETA as often as the first.


def make(setting: Setting) -> dict[str, Prompting]:
    """Makes an evaluator for each of `eval.ruler.tasks`.

    Raises:
      ConfigError: one is none, or the model doesn't read such lengths.
    """
    check_lengths("eval.ruler.lengths", setting.config.eval.ruler.lengths, setting)
    names = [name.strip() for name in setting.config.eval.ruler.tasks.split(",")]
    for name in names:
        if name not in MAX_NEW_TOKENS:
            known = ", ".join(MAX_NEW_TOKENS)
            raise ConfigError(f"eval.ruler.tasks names {name!r}, but must name tasks among {known}.")
    return {f"ruler_{name}": Prompting(setting, Ruler(name)) for name in names}


class Ruler:
    """One of the tasks; a cell is a length."""

    stop_strings: tuple[str, ...] = ()

    def __init__(self, task: str):
        self.name, self._task = f"ruler_{task}", task
        self.max_new_tokens = MAX_NEW_TOKENS[task]

    def questions(self, setting: Setting) -> list[Question]:
        """`eval.ruler.trials` for each length, each with as much of its haystack as fits."""
        options = setting.config.eval.ruler
        lengths = sorted(numbers(options.lengths))
        size = NIAH.get(self._task)
        needs_text = size is not None and size.haystack == "text"
        haystack = open_haystack(setting, lengths[-1], options.trials) if needs_text else None
        prompt = read_prompts(options.prompts)["niah" if size else self._task]
        seed, number = setting.config.eval.seed, list(MAX_NEW_TOKENS).index(self._task)

        def built(trial: int, n: int) -> tuple[list[int], list[str]]:
            """The prompt of a trial with so many items in its context: sentences, needles or words; and the golds."""
            rng = np.random.default_rng((seed, number, trial))
            if size is not None:
                context, query, golds = needles_in(rng, n, size, haystack, trial, options.trials)
            else:
                context, query, golds = CONTEXTS[self._task](rng, n)
            kind = size.values if size else ""
            return setting.encode(filled(prompt, context=context, query=query, kind=kind)), golds

        questions = []
        for length in lengths:
            room = length - self.max_new_tokens
            num_items = largest_that_fits(lambda n: len(built(0, n)[0]), room, guess=length // 24)
            for trial in range(options.trials):
                n = max(num_items, 0)  # Nearly the same in all trials.
                tokens, golds = built(trial, n)
                while len(tokens) > room and n > 0:
                    n -= 1 + n // 100
                    tokens, golds = built(trial, n)
                if len(tokens) > room:
                    raise DataError(
                        f"{self._task} takes at least {len(tokens)} tokens and {self.max_new_tokens} for its answer, "
                        f"which don't fit into {length}, one of eval.ruler.lengths."
                    )
                about: dict[str, Any] = {"length": length, "trial": trial, "tokens": len(tokens)}
                if haystack is not None:
                    about["haystack"] = haystack.version
                questions.append(Question(tokens, tuple(golds), about))
        return questions

    def score(self, output: str, question: Question) -> dict[str, float]:
        """RULER's score of all these tasks; `string_match_part` is that of its question answering."""
        return {
            "string_match_all": scores.string_match_all(output, question.golds),
            "string_match_part": scores.string_match_part(output, question.golds),
        }

    def metrics(self, records: Sequence[Record]) -> dict[str, Interval]:
        """The mean at each length, and the effective length."""
        found, means = {}, {}
        for length in sorted({record["length"] for record in records}):
            own = [record["scores"]["string_match_all"] for record in records if record["length"] == length]
            found[f"string_match_all/length_{length}"] = binomial_interval(sum(own), len(own))
            means[length] = sum(own) / len(own)
        return found | {"effective_length": Interval(float(scores.effective_length(means)), None, None)}


def read_prompts(path: str | None) -> dict[str, str]:
    """The prompts of all tasks; a file of JSON, {"niah": ..., "vt": ...}, takes the place of some.

    Raises:
      ConfigError: it can't be read, or a prompt lacks a name in braces.
    """
    if path is None:
        return PROMPTS
    try:
        check_is_file(path)
        found = parse_json(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"eval.ruler.prompts is {path}, which can't be read as JSON ({error}).") from error
    needed = {
        "niah": ("{context}", "{query}"),
        "vt": ("{context}", "{query}"),
        "cwe": ("{context}",),
        "fwe": ("{context}",),
    }
    is_valid = isinstance(found, dict) and all(
        name in needed and isinstance(text, str) and all(brace in text for brace in needed[name])
        for name, text in found.items()
    )
    if not is_valid:
        raise ConfigError(
            f"eval.ruler.prompts is {path}, but must be an object with prompts of niah and vt, each with {{context}} "
            "and {query}, and of cwe and fwe, with {context}."
        )
    return PROMPTS | found


# ------------------------------------------------------------------------------------------------------------- contexts


def needles_in(
    rng: np.random.Generator, n: int, size: NiahSize, haystack: Haystack | None, trial: int, trials: int
) -> tuple[str, str, list[str]]:
    """Needles at random depths of n sentences of noise, of n other needles, or of about 24 n tokens of text."""
    keys = _distinct(rng, size.keys, size.num_keys)
    values = {key: _distinct(rng, size.values, size.num_values) for key in keys}
    needles = [_needle(size, key, value) for key in keys for value in values[key]]
    shares = np.sort(rng.random(len(needles)))
    rng.shuffle(needles)
    asked = [keys[i] for i in rng.permutation(size.num_keys)[: size.num_queries]]
    if size.haystack == "text":
        assert haystack is not None
        context = haystack.context(trial, trials, 24 * n)
        text = context.with_sentences(list(zip(needles, shares.tolist(), strict=True)))
    else:
        if size.haystack == "noise":
            units = [NOISE] * n
        else:
            others = zip(_distinct(rng, size.keys, n, keys), _distinct(rng, size.values, n), strict=True)
            units = [_needle(size, key, value) for key, value in others]
        for needle, share in zip(reversed(needles), reversed(shares.tolist()), strict=True):
            units.insert(int(share * (len(units) + 1)), needle)
        text = "\n".join(units)
    return text, _listed(asked), [value for key in asked for value in values[key]]


def _needle(size: NiahSize, key: str, value: str) -> str:
    return f"One of the special {size.values} for {key} is: {value}."


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f", and {words[-1]}"


def _distinct(rng: np.random.Generator, kind: str, count: int, taken: Sequence[str] = ()) -> list[str]:
    """So many different words (two of them with a hyphen), seven-digit numbers or UUIDs."""
    draws: dict[str, Callable[[], str]] = {
        "words": lambda: f"{KEYS[rng.integers(len(KEYS))]}-{VALUES[rng.integers(len(VALUES))]}",
        "numbers": lambda: str(rng.integers(1_000_000, 10_000_000)),
        "uuids": lambda: str(uuid.UUID(bytes=rng.bytes(16), version=4)),
    }
    found, most = dict.fromkeys(taken), len(KEYS) * len(VALUES) // 2 if kind == "words" else 10**6
    while len(found) < count + len(taken):
        drawn = draws[kind]()
        # Of words there are about 4,000 pairs; a longer haystack numbers them.
        found[drawn if len(found) < most else f"{drawn}-{len(found)}"] = None
    return list(found)[len(taken) :]


def variables(rng: np.random.Generator, n: int) -> tuple[str, str, list[str]]:
    """A chain of variables that all have one value, in order, among n sentences of noise."""
    letters = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    names: list[str] = []
    while len(names) < NUM_HOPS + 1:
        name = "".join(rng.choice(letters, 5))
        names += [name] * (name not in names)
    value = str(rng.integers(10_000, 100_000))
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {name} = VAR {before}" for before, name in zip(names, names[1:], strict=False)]
    units, places = [NOISE] * n, np.sort(rng.integers(0, n + 1, len(lines)))
    for line, place in zip(reversed(lines), reversed(places.tolist()), strict=True):
        units.insert(place, line)
    return "\n".join(units), value, names


def common_words(rng: np.random.Generator, n: int) -> tuple[str, str, list[str]]:
    """A numbered, shuffled list of ten words that come 30 times and n that come 3 times."""
    words = _distinct(rng, "words", NUM_COMMON + n)
    listed = np.array(words[:NUM_COMMON] * COMMON_TIMES + words[NUM_COMMON:] * UNCOMMON_TIMES)
    rng.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed.tolist(), start=1)), "", words[:NUM_COMMON]


def frequent_words(rng: np.random.Generator, n: int) -> tuple[str, str, list[str]]:
    """About 8 n coded words and dots, shuffled; the word of rank k comes about as often as the zeta law says.

    The most frequent "word" is a row of dots, and those of ranks 2 to 4 are asked for, as in RULER.
    """
    letters, total = list("abcdefghijklmnopqrstuvwxyz"), 8 * max(n, 1) + 32
    ranks = np.arange(1, 2 + int(total**0.5))
    weights = ranks**-ZETA / np.sum(np.arange(1, 10_000) ** -ZETA)
    counts = np.maximum((total * weights).astype(int), 1)
    words: dict[str, None] = {"...": None}
    while len(words) < len(ranks):
        words["".join(rng.choice(letters, CODED_LENGTH))] = None
    listed = np.repeat(list(words), counts)
    rng.shuffle(listed)
    return " ".join(listed.tolist()), "", list(words)[1:4]


CONTEXTS = {"vt": variables, "cwe": common_words, "fwe": frequent_words}
