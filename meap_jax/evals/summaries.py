"""Summaries (the paper's Table 4, "hallucination"): articles are summarized, and the summaries are measured.

Against the reference by ROUGE and, as in the paper, by a judge, which is likeness and not truth; against the article by
the shares of n-grams and numbers that stand in it.
"""

import heapq
import os
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from meap_jax.errors import ConfigError
from meap_jax.evals.endpoint import Endpoint
from meap_jax.evals.faithfulness import ngrams_in_source, numbers_in_source
from meap_jax.evals.judge import Judge, Verdict
from meap_jax.evals.predictions import Record
from meap_jax.evals.prompting import Prompting, Question
from meap_jax.evals.request_log import RequestLog
from meap_jax.evals.rouge import rouge_l, rouge_n, words
from meap_jax.evals.setting import Setting
from meap_jax.model.decoder import Params
from meap_jax.readers.objects import read_lines
from meap_jax.results import Interval, Result
from meap_jax.statistics import binomial_interval, mean_interval

PROMPT = "Summarize the following article: {}"  # Paper, section 4.1.5.


class Article(NamedTuple):
    """A text, and a summary of it by a person."""

    record: int  # Its number in the file, from 1, blank lines left out.
    document: str
    summary: str


def make(setting: Setting) -> dict[str, "Summaries"]:
    """Makes one for each file of `eval.summaries.path`: {"summaries_NAME": evaluator}. Reads the files.

    Raises:
      ConfigError: the files or the judge are not named as they must be.
      DataError: a line of a file is wrong.
    """
    options = setting.config.eval.summaries
    files, judge = files_of(options.path), open_judge(setting)
    found = {}
    for name, file in files.items():
        articles = draw(file, options.document, options.summary, options.num_documents, setting.config.eval.seed)
        task = Summarizing(f"summaries_{name}", articles, options.max_new_tokens)
        found[task.name] = Summaries(Prompting(setting, task), judge)
    return found


def files_of(path: str | None) -> dict[str, Path]:
    """Reads `eval.summaries.path`, "xsum=/data/xsum.jsonl,multinews=...", in that order.

    Raises:
      ConfigError: it is none of that form, or has a name twice.
    """
    entries = [entry.strip().partition("=") for entry in (path or "").split(",")]
    files = {name: Path(file) for name, _, file in entries}
    if len(files) < len(entries) or not all(file and re.fullmatch(r"\w+", name) for name, _, file in entries):
        raise ConfigError(
            f"eval.summaries.path is {path!r}, but must be name=FILE,..., each name once, such as "
            "xsum=/data/xsum.jsonl,multinews=/data/multinews.jsonl."
        )
    return files


def open_judge(setting: Setting) -> Judge | None:
    """The judge of `eval.summaries.*`, on the first process alone; None where the config names none.

    Nor is there one where no predictions are kept, which is during training: no endpoint should stop a run.

    Raises:
      ConfigError: it has no name or no proper address.
      DataError: the log of its earlier replies is damaged.
    """
    options = setting.config.eval.summaries
    if options.judge_url is None:
        return None
    if not options.judge_model:
        raise ConfigError("eval.summaries.judge_model is '', but must name the model at eval.summaries.judge_url.")
    endpoint = Endpoint(options.judge_url, os.environ.get("OPENAI_API_KEY"))
    if setting.folder is None or jax.process_index() != 0:
        return None
    log = RequestLog(setting.folder / "judge.jsonl")
    return Judge(endpoint, options.judge_model, options.judge_budget, log)


def draw(file: Path, document: str, summary: str, number: int, seed: int) -> list[Article]:
    """Draws articles of a file without replacement, in the order of the file; all of them if it has no more.

    Each record has a random number of its own, and the smallest win: a larger `number` keeps what a smaller one drew.

    Args:
      file: .jsonl or .jsonl.gz.
      document, summary: names of the two fields; each line is checked for them.
      number: how many to draw.
      seed: of the draw.

    Raises:
      DataError: a line lacks a field; with file and line.
    """
    rng = random.Random(seed)
    lines = read_lines(file, (document, summary), "eval.summaries.path")
    articles = (
        (rng.random(), Article(n, record[document], record[summary])) for n, (_, record) in enumerate(lines, start=1)
    )
    return sorted(article for _, article in heapq.nsmallest(number, articles))


class Summarizing:
    """The task: one prompt an article."""

    stop_strings: tuple[str, ...] = ()

    def __init__(self, name: str, articles: Sequence[Article], max_new_tokens: int):
        self.name, self.max_new_tokens = name, max_new_tokens
        self._articles = {article.record: article for article in articles}

    def questions(self, setting: Setting) -> list[Question]:
        """The article in the paper's prompt, whole."""
        return [
            Question(setting.encode(PROMPT.format(article.document)), (article.summary,), {"record": article.record})
            for article in self._articles.values()
        ]

    def score(self, output: str, question: Question) -> dict[str, float]:
        """ROUGE against the reference, and what stands in the article; shares of nothing are left out."""
        article = self._articles[question.about["record"]]
        found: dict[str, float] = {}
        ours, theirs = words(output), words(article.summary)
        overlaps = {"1": rouge_n(ours, theirs, 1), "2": rouge_n(ours, theirs, 2), "L": rouge_l(ours, theirs)}
        for kind, overlap in overlaps.items():
            found |= {f"rouge{kind}": overlap.f1, f"rouge{kind}_recall": overlap.recall}
        shares = {f"faithful_{n}grams": ngrams_in_source(output, article.document, n) for n in (1, 2, 3)}
        shares["faithful_numbers"] = numbers_in_source(output, article.document)
        return found | {name: share for name, share in shares.items() if share is not None}

    def metrics(self, records: Sequence[Record]) -> dict[str, Interval]:
        """The mean of each score over the articles that have it, and of the words of an output."""
        names = dict.fromkeys(name for record in records for name in record["scores"])
        found = {
            name: mean_interval(np.array([record["scores"][name] for record in records if name in record["scores"]]))
            for name in names
        }
        return found | {"words": mean_interval(np.array([len(words(record["output"])) for record in records]))}


class Summaries:
    """An evaluator that has articles summarized, and then has the summaries judged; an example is an article."""

    def __init__(self, prompting: Prompting, judge: Judge | None):
        self._prompting, self._judge = prompting, judge

    def run(self, params: Params) -> Result:
        """Returns the metrics of `Summarizing`; with a judge `judged`, its share of 1s, and the number of `not_judged`.

        Raises:
          ConfigError: see `Judge.verdicts`. All summaries are kept.
        """
        metrics, records = self._prompting.run(params)
        if self._judge is None:
            return Result(metrics, records)
        at = [i for i, record in enumerate(records) if "scores" in record]
        verdicts = self._judge.verdicts([(records[i]["output"], records[i]["golds"][0]) for i in at])
        judged = dict(zip(at, verdicts, strict=True))
        examples = [with_verdict(record, judged.get(i)) for i, record in enumerate(records)]
        return Result(metrics | judged_metrics(verdicts), examples)


def with_verdict(record: Record, verdict: Verdict | None) -> Record:
    """A record with what a judge said of its output; without a score there is none in `scores` either."""
    if verdict is None:
        return record
    scores: Mapping[str, float] = {} if verdict.score is None else {"judged": float(verdict.score)}
    return record | {"scores": record["scores"] | scores, "judge": verdict._asdict()}


def judged_metrics(verdicts: Sequence[Verdict]) -> dict[str, Interval]:
    """The share of 1s among the scores, with Wilson's interval, and how many outputs got none."""
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    found = {"judged": binomial_interval(sum(scores), len(scores))} if scores else {}
    return found | {"not_judged": Interval(float(len(verdicts) - len(scores)), None, None)}
