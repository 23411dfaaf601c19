"""Shows what fine-tuning would read: python -m meap_jax.corpus.chat_report --config=configs/sft_X.py [--samples=3].

Prepares the data if it isn't there, as training does. What is counted is what a run of this config reads: rows, samples
with a copy whose answers are masked, samples that lost their beginning or were left out, duplicates. Samples are shown
as they are in their rows, with the masks of a step: on a terminal in colour, elsewhere as [MASK:what it hides].
"""

import dataclasses
import os
import shutil
import sys
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from etils import epath

from meap_jax import cli
from meap_jax.corpus.prepare import prepare
from meap_jax.data.prepared import Prepared, open_store
from meap_jax.data.samples import ANSWER
from meap_jax.data.spec import ChatPlanSpec, data_spec
from meap_jax.data.store import SPLITS, Store
from meap_jax.errors import ConfigError
from meap_jax.objective import Inputs, Objective, make_inputs, named_keys
from meap_jax.rows import Row, stacked
from meap_jax.tokenizers import Tokenizer

_BINS = (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000)  # Upper ends of the lengths of answers in the histogram.
_CHUNK = 4_096  # Documents that are read at a time.
_ROWS = 64  # In which samples to show are looked for.


class Style(NamedTuple):
    """How kinds of tokens are written: what is put in front of each, and behind."""

    prompt: tuple[str, str]
    answer: tuple[str, str]
    masked: tuple[str, str]


PLAIN = Style(("", ""), ("", ""), ("[MASK:", "]"))
COLOURED = Style(("\033[2m", "\033[0m"), ("", ""), ("\033[7;31m", "\033[0m"))


def report(config: ml_collections.ConfigDict, prepared: Prepared, num_samples: int, style: Style) -> str:
    """The report on all sources of conversations of a config.

    Args:
      config: of a run.
      prepared: its data.
      num_samples: samples of each source that are shown.
      style: of their tokens.

    Raises:
      ConfigError: the config reads no conversations.
    """
    chats = [name for name, plan in prepared.spec.plans.items() if isinstance(plan, ChatPlanSpec)]
    if not chats:
        raise ConfigError(f"data.mixture is {config.data.mixture!r}, which names no source of the format chat.")
    return "\n".join(part for name in chats for part in _of_source(config, prepared, name, num_samples, style))


def _of_source(
    config: ml_collections.ConfigDict, prepared: Prepared, name: str, num_samples: int, style: Style
) -> list[str]:
    store, manifest = open_store(prepared.folder / name), prepared.manifest(name)
    lines = [f"{name}: {prepared.folder / name}", ""]
    lines += _table(
        ["split", "samples", "rows", "tokens", "padding", "with copy", "no room", "truncated", "left out"],
        [_split_row(split, counts) for split, counts in prepared.plan_manifest(name)["splits"].items()],
    )
    lines += [
        f"  rows of {prepared.block_len:,} tokens",
        f"  with copy: samples with an answer of more than {config.sft.longer_than} tokens, which MEAP masks in a copy "
        f"({config.sft.arrangement})",
        "  no room: samples that don't fit into a row with their copy; shared_prefix gives it a place of its own, "
        "concat leaves it out",
        "",
    ]
    skipped = manifest["skipped"]
    lines += [f"bad records: {sum(skipped.values())}"]
    lines += [f"  {count} x {reason}" for reason, count in sorted(skipped.items())]
    lines += [f"duplicates: {_duplicates(store)} samples have the tokens of an earlier one", ""]
    lines += _histogram(store)
    return [*lines, "", *_samples(config, prepared, name, num_samples, style)]


def _split_row(split: str, counts: dict[str, Any]) -> list[str]:
    share = counts["with_copy"] / max(1, counts["samples"])
    return [
        split, f"{counts['samples']:,}", f"{counts['blocks']:,}", f"{counts['tokens']:,}",
        f"{counts['padding_share']:.1%}", f"{share:.1%}", f"{counts['without_room']:,}", f"{counts['truncated']:,}",
        f"{counts['skipped']:,}",
    ]  # fmt: skip


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]
    ]


def _duplicates(store: Store) -> int:
    seen = Counter[bytes]()
    for first in range(0, len(store), _CHUNK):
        seen.update(ids.tobytes() for ids in store.read(range(first, min(first + _CHUNK, len(store)))))
    return seen.total() - len(seen)


def _histogram(store: Store) -> list[str]:
    """Lengths of training answers, their ends not counted."""
    spans = store.spans(ANSWER)
    lengths = spans["length"][store.index["split"][spans["document"]] == SPLITS.index("train")].astype(int) - 1
    counts = np.bincount(np.searchsorted(_BINS, lengths), minlength=len(_BINS) + 1)
    middle, high = np.quantile(lengths, (0.5, 0.95)) if len(lengths) else (0, 0)
    lines = [f"tokens of an answer: median {middle:.0f}, 95 % have at most {high:.0f}"]
    ends = [f"up to {end:,}" for end in _BINS] + [f"above {_BINS[-1]:,}"]
    room = max(20, min(60, shutil.get_terminal_size().columns - 40))
    for end, count in zip(ends, counts.tolist(), strict=True):
        bar = "#" * round(room * count / max(1, counts.max()))
        lines.append(f"  {end:>12}  {count:>8,}  {bar}".rstrip())
    return lines


def _samples(
    config: ml_collections.ConfigDict, prepared: Prepared, name: str, num_samples: int, style: Style
) -> list[str]:
    """The first samples of the training rows, masked as in step 0 with the full ratio; those with masks come first."""
    blocks = prepared.blocks(name, "train")
    first = stacked([blocks[i].only(prepared.spec.row_fields) for i in range(min(len(blocks), _ROWS))])
    rows = jax.tree.map(jnp.asarray, first)
    objective = dataclasses.replace(Objective.of(config), ramp_from=None, rows_per_mean=0)
    inputs = make_inputs(rows, objective, named_keys(config), jnp.int32(0))
    segment_ids = np.asarray(rows.segment_ids)
    segments = [(row, n) for row, own in enumerate(segment_ids) for n in range(1, int(own.max()) + 1)]
    is_masked, of_input = np.asarray(inputs.is_masked), segment_ids[:, :-1]
    segments.sort(key=lambda own: not is_masked[own[0]][of_input[own[0]] == own[1]].any())
    lines = []
    for number, (row, segment) in enumerate(segments[:num_samples], 1):
        text = _rendered(prepared.tokenizer, rows, inputs, row, segment, style)
        lines += [f"--- sample {number}: row {row}, document {segment} of it ---", text, ""]
    return lines


def _rendered(tokenizer: Tokenizer, rows: Row, inputs: Inputs, row: int, segment: int, style: Style) -> str:
    """The text of a sample in a row: prompt, answer, and what masks hide."""
    places = np.flatnonzero(np.asarray(rows.segment_ids)[row] == segment)
    tokens = np.asarray(rows.tokens[row])
    is_masked = np.append(np.asarray(inputs.is_masked[row]), False)
    is_answer = np.zeros(len(tokens), bool) if rows.loss_weights is None else np.asarray(rows.loss_weights[row]) > 0
    kinds = np.where(is_masked, 2, np.where(is_answer, 1, 0))[places]
    text, cuts = "", np.flatnonzero(np.diff(kinds)) + 1
    for run, kind in zip(np.split(places, cuts), kinds[np.append(0, cuts)], strict=True):
        before, behind = style[kind]
        text += before + tokenizer.decode(tokens[run], continues=bool(text)) + behind
    return text


def command(argv: list[str]) -> None:
    """Prepares the data of `--config` and prints the report."""
    values = flags.FlagValues()
    flags.DEFINE_integer("samples", 3, "Samples that are shown.", 0, flag_values=values)
    try:
        rest = values(argv, known_only=True)
    except flags.Error as error:
        raise ConfigError(" ".join(str(error).split())) from error
    config, workdir = cli.parse_config(rest)
    prepared = prepare(config.data.prepared or str(epath.Path(workdir) / "data"), data_spec(config))
    prepared.check_mask_id(config.objective.mask_id)
    is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(report(config, prepared, values.samples, COLOURED if is_coloured else PLAIN))


if __name__ == "__main__":
    cli.run_command(command)
