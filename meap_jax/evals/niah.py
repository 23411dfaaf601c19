"""Needle in a haystack (the paper's Table 2 and Figure 3): one sentence in a long text, and a question about it.

A grid of lengths and depths. Each trial of a cell has its own needle and begins at its own place of the haystack. All
depths of a length and trial are one text with the needle at another place, so that they begin alike.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from meap_jax.errors import ConfigError, DataError
from meap_jax.evals import scores
from meap_jax.evals.haystack import Haystack, filled, open_haystack, read_prompt
from meap_jax.evals.predictions import Record
from meap_jax.evals.prompting import Prompting, Question
from meap_jax.evals.setting import Setting
from meap_jax.fields import numbers
from meap_jax.readers.objects import read_lines
from meap_jax.results import Interval
from meap_jax.statistics import binomial_interval, clustered_interval

PROMPT = "Here is a long text. Remember what it says.\n\n{context}\n\nQuestion: {question}\nAnswer:"
SCORES = ("exact_match", "rouge1_recall", "substring")


class Needle(NamedTuple):
    """A sentence, what is asked about it, and the answer, which is a part of the sentence."""

    needle: str
    question: str
    answer: str


def _of_city(city: str, answer: str) -> Needle:
    stem = f"best thing to do in {city}"
    return Needle(f"The {stem} is to {answer}", f"What is the {stem}?", answer)


# Of the form of the published needle: something that no text says, and an answer of about twelve words.
NEEDLES = (
    _of_city("Lisbon", "drink coffee on a tram and watch the boats until the lamps are lit."),
    _of_city("Osaka", "eat noodles under a bridge and count the lanterns on the slow river."),
    _of_city("Nairobi", "fly a kite over the reservoir and share mangoes with the gardeners."),
    _of_city("Bergen", "ride the old funicular in fog and write postcards to a stranger."),
    _of_city("Quito", "climb the clock tower at noon and whistle to the flower sellers."),
    _of_city("Hobart", "borrow a yellow canoe and read poems aloud to the sleepy pelicans."),
    _of_city("Tbilisi", "bake flat bread at dawn and trade it for walnuts in the bazaar."),
    _of_city("Galway", "juggle oranges on the pier and dance when the church bells ring."),
)


def make(setting: Setting) -> dict[str, Prompting]:
    """Makes the evaluator of the grid that `eval.niah.*` describes.

    Raises:
      ConfigError: the model doesn't read such lengths.
    """
    check_lengths("eval.niah.lengths", setting.config.eval.niah.lengths, setting)
    return {"niah": Prompting(setting, NeedleInAHaystack())}


class NeedleInAHaystack:
    """The task; a cell is a length and a depth."""

    name, max_new_tokens = "niah", 50
    stop_strings: tuple[str, ...] = ()

    def questions(self, setting: Setting) -> list[Question]:
        """One for each length, trial and depth, the deepest first: it shares most with the others."""
        options = setting.config.eval.niah
        lengths, depths = sorted(numbers(options.lengths)), sorted(numbers(options.depths), reverse=True)
        needles = NEEDLES if options.needles is None else read_needles(Path(options.needles))
        prompt = read_prompt(options.prompt, PROMPT, ("context", "question"), "eval.niah.prompt")
        haystack = open_haystack(setting, lengths[-1], options.trials)
        return [
            self._question(setting, haystack, prompt, needles[trial % len(needles)], length, depth, trial)
            for length in lengths
            for trial in range(options.trials)
            for depth in depths
        ]

    def _question(
        self, setting: Setting, haystack: Haystack, prompt: str, needle: Needle, length: int, depth: int, trial: int
    ) -> Question:
        """The longest prompt that leaves room for the answer within `length` tokens."""
        room = length - self.max_new_tokens
        fixed = len(setting.encode(filled(prompt, context=needle.needle, question=needle.question)))
        if fixed > room:
            raise DataError(
                f"a needle of {fixed} tokens with its question ({needle.needle[:40]!r}...) and {self.max_new_tokens} "
                f"tokens for the answer don't fit into {length}, one of eval.niah.lengths."
            )
        context = haystack.context(trial, setting.config.eval.niah.trials, room - fixed)
        while True:
            text = context.with_sentences([(needle.needle, depth / 100)])
            tokens = setting.encode(filled(prompt, context=text, question=needle.question))
            if len(tokens) <= room:
                break
            # Where texts meet, tokens may be others: a few sentences less.
            fewer = max(1, (len(tokens) - room) // 64)
            context = haystack.between(context.first, max(context.first, context.last - fewer))
        about = {
            "length": length, "depth": depth, "trial": trial, "haystack": haystack.version, "tokens": len(tokens)
        }  # fmt: skip
        return Question(tokens, (needle.answer,), about, shares=f"{length} tokens, trial {trial}")

    def score(self, output: str, question: Question) -> dict[str, float]:
        """Exact match of the answer, recall of its distinct words, and RULER's substring match."""
        [gold] = question.golds
        return {
            "exact_match": scores.exact_match(output, gold),
            "rouge1_recall": scores.rouge1_recall(output, gold),
            "substring": scores.string_match_all(output, [gold.rstrip(".")]),
        }

    def metrics(self, records: Sequence[Record]) -> dict[str, Interval]:
        """Means over the grid, whose trials are the independent units, of each length and of each cell."""
        return grid_metrics(records, SCORES)


def grid_metrics(records: Sequence[Record], names: Sequence[str]) -> dict[str, Interval]:
    """Metrics of records with `length`, `depth` and `trial`: over all, of each length, and of each cell.

    A trial is one needle and one place of the haystack in every cell, so that its cells are not independent.
    """
    groups = defaultdict(list)
    for record in records:
        length = f"length_{record['length']}"
        for group in ("", f"/{length}", f"/{length}/depth_{record['depth']}"):
            groups[group].append(record)
    found = {}
    for name in names:
        for group, own in groups.items():
            values, trials = [r["scores"][name] for r in own], [r["trial"] for r in own]
            is_cell = len(set(trials)) == len(trials)
            found[name + group] = (
                binomial_interval(sum(values), len(values)) if is_cell else clustered_interval(values, trials)
            )
        means = {n: found[f"{name}/length_{n}"].estimate for n in {r["length"] for r in records}}
        found[f"{name}/effective_length"] = Interval(float(scores.effective_length(means)), None, None)
    return found


def check_lengths(field: str, lengths: str, setting: Setting) -> None:
    """Checks that the model can read prompts of these lengths.

    Raises:
      ConfigError: one is longer than it reads.
    """
    longest = max(numbers(lengths))
    if longest > setting.seq_len:
        raise ConfigError(
            f"{field} has {longest}, but the model reads {setting.seq_len} tokens: choose shorter ones, or "
            "set eval.seq_len to ask it for more than it was trained on."
        )


def read_needles(file: Path) -> list[Needle]:
    """Reads needles from a file of JSON lines.

    Raises:
      DataError: a line has not the three fields, as texts.
    """
    return [Needle(**fields) for _, fields in read_lines(file, Needle._fields, "eval.niah.needles")]
