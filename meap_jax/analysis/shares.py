"""Shows models texts of five segments, and measures how attention is shared out among the segments."""

import functools
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float

from meap_jax.analysis import segments, sequences
from meap_jax.analysis.attention import FIRST_TOKEN
from meap_jax.analysis.contrasts import with_holm
from meap_jax.analysis.masked import about, check_model
from meap_jax.analysis.segments import EXAMPLES, PAPER, SCORES, SEGMENTS, VIEWS, Example
from meap_jax.errors import DataError
from meap_jax.models import OpenModel, open_model, open_stored_model
from meap_jax.readers.objects import read_lines
from meap_jax.statistics import mean_interval, t_test

_log = logging.getLogger("meap_jax.analysis")

CHOICES = {
    "scope": "these figures speak of these models on these texts, not of the objectives that they were trained with",
    "views": VIEWS,
    "scores": SCORES,
    "first_token": "with: as the model computes; without: no key, the other weights of a query divided by their sum",
    "layers_and_heads": "the mean over all of them, then the five scores are divided by their sum; layers: each alone",
}


def read_examples(path: str | None) -> list[Example]:
    """The texts of a JSONL file, or the four of `segments.EXAMPLES`.

    Each line is an object with the strings before, answer, after, query and eos, and perhaps a name; eos may be empty,
    which means the tokenizer's own end of a document.

    Raises:
      DataError: naming the file, the line and what it lacks.
    """
    if path is None:
        return list(EXAMPLES)
    found: list[Example] = []
    for where, record in read_lines(Path(path).expanduser(), field="--examples"):
        for name in SEGMENTS:
            if not isinstance(record.get(name), str):
                problem = "is not a string" if name in record else "is missing"
                raise DataError(f"{where}: the field {name!r} {problem}; each line must have {', '.join(SEGMENTS)}.")
        name = str(record.get("name", where.rpartition(", ")[2]))
        if any(example.name == name for example in found):
            raise DataError(f"{where}: the name {name!r} comes twice.")
        found.append(Example(name, **{field: record[field] for field in SEGMENTS}))
    if not found:
        raise DataError(f"{path} holds no example: each line must be an object with {', '.join(SEGMENTS)}.")
    return found


def measure(opened: OpenModel, examples: Sequence[Example]) -> list[dict[str, Float[np.ndarray, "L+1 2 V 5"]]]:
    """For each example the scores of each layer, and at last of the mean over layers, {name in `SCORES`: array}."""
    model, tokenizer = opened.model, opened.tokenizer
    assert tokenizer is not None, "a workdir has one"
    ids, of = zip(*(segments.encode(example, tokenizer) for example in examples), strict=True)
    longest = max(map(len, ids))
    if longest > model.config.seq_len:
        name = examples[[len(row) for row in ids].index(longest)].name
        raise DataError(f"the example {name!r} has {longest} tokens, but the model reads {model.config.seq_len}.")
    length = -(-longest // 64) * 64  # Few programs for many sets of examples.
    program = functools.partial(segments.segment_statistics, opened.params, definition=model.definition)
    tokens = segments.padded(ids, length, tokenizer.pad_id)
    with jax.set_mesh(model.mesh):
        sums = sequences.in_batches(program, model.mesh, tokens, segments.padded(of, length, segments.PADDING))
    by_layer = sums.mean(axis=2, dtype=float)
    with_mean = np.concatenate([by_layer, by_layer.mean(axis=1, keepdims=True)], axis=1)
    return [segments.scores(own, numbers) for own, numbers in zip(with_mean, of, strict=True)]


def analyse(
    folders: Sequence[epath.Path], examples: Sequence[Example], mesh: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Shares of attention of every model on every example.

    Args:
      folders: absolute workdirs of runs or of imported models; others are compared with the first.
      examples: texts with different names.
      mesh: sizes of its axes, in place of the configs'.

    Returns:
      Of JSON's types: `setting`; `shares`, {workdir: {example: {"mean" or "sum": {first_token: {view: {"all": [5],
      "layers": [L][5]}}}}}}; `differences`, the mean over examples of each model's shares less the first model's, where
      there are two examples or more; `paper`.

    Raises:
      ConfigError, DataError: a model or an example that can't be used.
    """
    shares: dict[str, Any] = {}
    abouts = []
    for folder in folders:
        stored = open_stored_model(folder, mesh=mesh)
        check_model(stored, "--workdir", folder, stored.model.config.seq_len)
        abouts.append(about(stored, folder))
        found = measure(open_model(folder, mesh=mesh), examples)
        shares[str(folder)] = {
            example.name: {
                score: {
                    first: {
                        view: {"all": array[-1, c, v].tolist(), "layers": array[:-1, c, v].tolist()}
                        for v, view in enumerate(VIEWS)
                    }
                    for c, first in enumerate(FIRST_TOKEN)
                }
                for score, array in own.items()
            }
            for example, own in zip(examples, found, strict=True)
        }
        _log.info("%s: %d examples", folder, len(examples))
    return {
        "setting": {"models": abouts, "segments": SEGMENTS, "choices": CHOICES},
        "examples": [example._asdict() for example in examples],
        "shares": shares,
        "differences": differences(shares) if len(examples) > 1 else [],
        "paper": {example.name: PAPER[example.name] for example in examples if example in EXAMPLES},
    }


def differences(shares: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each model's shares less the first model's over examples, seen from the end: a record a segment and reading.

    p values are corrected for the records of a score, which one table shows.
    """
    first, *others = shares
    found = []
    for score in SCORES:
        of_score = []
        for other, first_token in itertools.product(others, FIRST_TOKEN):
            less, of_other = (
                np.array([own[score][first_token]["eos"]["all"] for own in shares[model].values()])
                for model in (first, other)
            )
            for segment, column in zip(SEGMENTS, (of_other - less).T, strict=True):
                reading = {"workdir": other, "less": first, "score": score, "first_token": first_token}
                tested = {"difference": mean_interval(column)._asdict(), **t_test(column)._asdict()}
                of_score.append(reading | {"segment": segment} | tested)
        found += with_holm(of_score)
    return found
