"""Key-value retrieval: a JSON object of random keys and values, and the value of one key is asked for.

lost-in-the-middle's files, or pairs that are generated as theirs are.
"""

import json
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from meap_jax.errors import ConfigError, DataError
from meap_jax.evals import scores
from meap_jax.evals.haystack import filled, read_prompt
from meap_jax.evals.mdqa import by_position
from meap_jax.evals.predictions import Record
from meap_jax.evals.prompting import Prompting, Question
from meap_jax.evals.setting import Setting
from meap_jax.fields import numbers
from meap_jax.readers.objects import read_lines, text_of
from meap_jax.results import Interval

PROMPT = 'A JSON object:\n\n{formatted_kv_records}\n\nIts value for the key "{key}" is'

Asked = tuple[list[tuple[str, str]], str, str]  # Pairs in order, the key that is asked for, and its value.


def make(setting: Setting) -> dict[str, Prompting]:
    """Makes the evaluator that `eval.kv.*` describes."""
    return {"kv": Prompting(setting, KeyValue())}


class KeyValue:
    """The task; a cell is the position of the pair that is asked for, from 1."""

    name, max_new_tokens = "kv", 100
    stop_strings: tuple[str, ...] = ()

    def questions(self, setting: Setting) -> list[Question]:
        """One for each object and position."""
        options = setting.config.eval.kv
        prompt = read_prompt(options.prompt, PROMPT, ("formatted_kv_records", "key"), "eval.kv.prompt")
        positions = sorted(numbers(options.positions))
        if options.path is None:
            asked = generated(options.num_keys, options.max_questions, setting.config.eval.seed)
        else:
            asked = read_pairs(Path(options.path))[: options.max_questions]
        questions = []
        for i, (pairs, key, value) in enumerate(asked):
            if positions[-1] > len(pairs):
                raise ConfigError(
                    f"eval.kv.positions is {options.positions}, but an object has {len(pairs)} pairs: no position may "
                    "be higher."
                )
            others = [pair for pair in pairs if pair[0] != key]
            for position in positions:
                placed = [*others[: position - 1], (key, value), *others[position - 1 :]]
                text = filled(prompt, formatted_kv_records=shown(placed), key=key)
                about = {"question": i, "pairs": len(pairs), "position": position}
                questions.append(Question(setting.encode(text), (value,), about))
        return questions

    def score(self, output: str, question: Question) -> dict[str, float]:
        """Whether the value is part of the output."""
        return {"accuracy": scores.contains(output, question.golds[0])}

    def metrics(self, records: Sequence[Record]) -> dict[str, Interval]:
        """Accuracy over all, whose objects are the independent units, and at each position."""
        return by_position(records, "accuracy")


def shown(pairs: Sequence[tuple[str, str]]) -> str:
    """Pairs as lost-in-the-middle writes them into a prompt: an object of JSON, a pair a line."""
    return "{" + ",\n ".join(f'"{key}": "{value}"' for key, value in pairs) + "}"


def generated(num_keys: int, count: int, seed: int) -> list[Asked]:
    """Objects of random UUIDs, of which a random key is asked for."""
    rng = np.random.default_rng(seed)

    def draw() -> str:
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))

    objects = ([(draw(), draw()) for _ in range(num_keys)] for _ in range(count))
    return [(pairs, *pairs[rng.integers(num_keys)]) for pairs in objects]


def read_pairs(file: Path) -> list[Asked]:
    """Reads a file of lost-in-the-middle.

    Raises:
      DataError: naming file, line and field.
    """
    found: list[Asked] = []
    for place, record in read_lines(file, field="eval.kv.path"):
        pairs = record.get("ordered_kv_records")
        is_pairs = isinstance(pairs, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
        )
        if not is_pairs or not pairs:
            raise DataError(f"{place} has no list of pairs of texts in the field 'ordered_kv_records'.")
        key, value = text_of(record, "key", place), text_of(record, "value", place)
        if [key, value] not in pairs:
            raise DataError(f"{place} asks for {json.dumps(key)}, which is not among its pairs with that value.")
        found.append(([(a, b) for a, b in pairs], key, value))
    return found
