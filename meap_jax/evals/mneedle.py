"""Multi-needle reasoning (the paper's Figure 4): several sentences in a long text answer one question together.

NeedleBench's M-RS as OpenCompass has it (opencompass/datasets/needlebench/multi.py): the first needle goes in at a
share of the context, each next one a fixed share later. Its needles have changed between versions, so that results name
the hash of the file. Without one, chains about people who do not exist are generated.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meap_jax.errors import ConfigError, DataError
from meap_jax.evals import scores
from meap_jax.evals.haystack import Haystack, filled, open_haystack, read_prompt
from meap_jax.evals.niah import check_lengths
from meap_jax.evals.predictions import Record
from meap_jax.evals.prompting import Prompting, Question
from meap_jax.evals.setting import Setting
from meap_jax.fields import numbers
from meap_jax.files import check_is_file, parse_json
from meap_jax.results import Interval
from meap_jax.statistics import clustered_interval

PROMPT = "Here is a document. Answer the question behind it in few words.\n\n{context}\n\nQuestion: {question}\nAnswer:"
_SYLLABLES = "bra dor fen gal hul jor kel lum mar nor pel quin ras sol tav ul vor wen yas zem".split()
_RELATIONS = ("teacher", "neighbour", "cousin", "publisher", "doctor", "landlord")
_WORKS = ("painting", "novel", "bridge", "opera", "garden", "telescope")


class Chain(NamedTuple):
    """Sentences that answer a question together."""

    needles: tuple[str, ...]
    question: str
    answer: str


def make(setting: Setting) -> dict[str, Prompting]:
    """Makes the evaluator of the grid that `eval.mneedle.*` describes.

    Raises:
      ConfigError: the model doesn't read such lengths.
    """
    check_lengths("eval.mneedle.lengths", setting.config.eval.mneedle.lengths, setting)
    return {"mneedle": Prompting(setting, MultiNeedle())}


class MultiNeedle:
    """The task; a cell is a length, a depth and a number of needles."""

    name, max_new_tokens = "mneedle", 50
    stop_strings: tuple[str, ...] = ()

    def questions(self, setting: Setting) -> list[Question]:
        """One for each length, number of needles, trial and depth, the deepest first, as in `niah`."""
        options = setting.config.eval.mneedle
        lengths, counts = sorted(numbers(options.lengths)), sorted(numbers(options.counts))
        depths = sorted(numbers(options.depths), reverse=True)
        if options.buffer < self.max_new_tokens:
            raise ConfigError(
                f"eval.mneedle.buffer is {options.buffer}, but must be at least {self.max_new_tokens}, the room for an "
                "answer."
            )
        prompt = read_prompt(options.prompt, PROMPT, ("context", "question"), "eval.mneedle.prompt")
        if options.needles is None:
            version = "generated"
            chains = {n: generated(n, options.trials, setting.config.eval.seed) for n in counts}
        else:
            chains = {n: read_chains(Path(options.needles), n) for n in counts}
            version = hashlib.sha256(Path(options.needles).read_bytes()).hexdigest()[:12]
        haystack = open_haystack(setting, lengths[-1], options.trials)
        cells = [(length, n, trial) for length in lengths for n in counts for trial in range(options.trials)]
        return [
            self._question(setting, haystack, prompt, chains[n][trial % len(chains[n])], length, depth, trial, version)
            for length, n, trial in cells
            for depth in depths
        ]

    def _question(
        self, setting: Setting, haystack: Haystack, prompt: str, chain: Chain, length: int, depth: int, trial: int,
        version: str,
    ) -> Question:  # fmt: skip
        """A prompt whose context, needles included, has the length less the buffer."""
        options, num = setting.config.eval.mneedle, len(chain.needles)
        of_needles = sum(len(setting.tokenizer.encode(f"\n{needle}\n")) for needle in chain.needles)
        room = length - options.buffer - of_needles
        if room < 1:
            raise DataError(
                f"{num} needles of {of_needles} tokens ({chain.needles[0][:40]!r}...) and eval.mneedle.buffer = "
                f"{options.buffer} don't fit into {length}, one of eval.mneedle.lengths."
            )
        context = haystack.context(trial, options.trials, room)
        shares = [min(depth + i * options.spacing, 100) / 100 for i in range(num)]
        placed = [(f"\n{needle}\n", share) for needle, share in zip(chain.needles, shares, strict=True)]
        text = filled(prompt, context=context.with_sentences(placed), question=chain.question)
        tokens = setting.encode(text)
        if len(tokens) + self.max_new_tokens > length:
            raise ConfigError(
                f"eval.mneedle.buffer is {options.buffer}, but a prompt of {len(tokens)} tokens and "
                f"{self.max_new_tokens} for the answer don't fit into {length}: it must be larger."
            )
        about = {
            "length": length, "depth": depth, "needles": num, "trial": trial, "version": version,
            "haystack": haystack.version, "tokens": len(tokens),
        }  # fmt: skip
        return Question(tokens, (chain.answer,), about, shares=f"{length} tokens, {num} needles, trial {trial}")

    def score(self, output: str, question: Question) -> dict[str, float]:
        """OpenCompass' score, as a share."""
        return {"word_share": scores.word_share(output, question.golds[0])}

    def metrics(self, records: Sequence[Record]) -> dict[str, Interval]:
        """Means over all, of each length (the paper's figure), and of each number of needles; trials are the units."""
        groups: dict[str, list[Record]] = {"word_share": list(records)}
        for record in records:
            groups.setdefault(f"word_share/length_{record['length']}", []).append(record)
            groups.setdefault(f"word_share/needles_{record['needles']}", []).append(record)
        return {name: clustered_interval(*_scores_and_trials(own)) for name, own in groups.items()}


def _scores_and_trials(records: Sequence[Record]) -> tuple[list[float], list[tuple[int, int]]]:
    return [r["scores"]["word_share"] for r in records], [(r["needles"], r["trial"]) for r in records]


def generated(num_needles: int, count: int, seed: int) -> list[Chain]:
    """Chains of people who do not exist: the maker of a work, and who was whose teacher, up to the last one's home.

    Every needle but the first begins with the name that the one before ends in, so that none can be left out.
    """
    rng = np.random.default_rng((seed, num_needles))
    chains = []
    for _ in range(count):
        names = _names(rng, num_needles + 2)
        work, place = _WORKS[rng.integers(len(_WORKS))], names[-1]
        relations = [_RELATIONS[rng.integers(len(_RELATIONS))] for _ in range(num_needles - 1)]
        needles = [f"The {work} called {names[0]} was made by {names[1]}."]
        asked = f"whoever made the {work} called {names[0]}"
        for i, relation in enumerate(relations[:-1] if num_needles > 1 else []):
            needles.append(f"{names[i + 1]}'s {relation} was {names[i + 2]}.")
            asked = f"the {relation} of {asked}"
        if num_needles > 1:
            last = names[num_needles - 1]
            needles.append(f"{last} was born in the town of {place}.")
            chains.append(Chain(tuple(needles), f"In which town was {asked} born?", place))
        else:
            chains.append(Chain(tuple(needles), f"Who made the {work} called {names[0]}?", names[1]))
    return chains


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Different invented names."""
    found = dict[str, None]()
    while len(found) < count:
        found["".join(rng.choice(_SYLLABLES, 3)).capitalize()] = None
    return list(found)


def read_chains(file: Path, num_needles: int) -> list[Chain]:
    """Reads the chains of so many needles from a file of NeedleBench.

    Raises:
      DataError: it is no list of such records, or has none of so many needles.
    """
    try:
        check_is_file(file)
        records = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"eval.mneedle.needles is {file}, which can't be read as JSON ({error}).") from error
    chains = []
    for number, record in enumerate(records if isinstance(records, list) else [None], start=1):
        try:
            needles, answer, question = record["derivations"], record["answer"], record["question"]
            is_valid = len(needles) == record["derivation_count"] and all(
                isinstance(text, str) and text.strip() for text in (*needles, answer, question)
            )
        except (TypeError, KeyError, AttributeError):
            is_valid = False
        if not is_valid:
            raise DataError(
                f"{file}, record {number} must have derivation_count, so many texts in derivations, a question and an "
                "answer."
            )
        if len(needles) == num_needles:
            chains.append(Chain(tuple(needles), question, answer))
    if not chains:
        raise DataError(f"{file} has no record of {num_needles} needles, which eval.mneedle.counts asks for.")
    return chains
