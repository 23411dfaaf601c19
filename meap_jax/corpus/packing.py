"""Packs the splits of a source into blocks as a `PlanSpec` asks; the algorithms are in `plans`."""

import contextlib
import dataclasses
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from meap_jax.corpus.workers import map_ahead, worker_pool
from meap_jax.data import plans
from meap_jax.data.manifest import hash_of_files, read_manifest, write_manifest
from meap_jax.data.prepared import open_store, plan_folder
from meap_jax.data.samples import plan_pieces
from meap_jax.data.spec import ChatPlanSpec, PlanSpec, RetrievalSourceSpec, SourceSpec, TextSourceSpec
from meap_jax.data.store import SPLITS, Store
from meap_jax.errors import DataError

_RANGE = 1 << 17  # Documents that are planned at a time.

_log = logging.getLogger(__name__)


def make_plans(store_folder: Path, spec: PlanSpec, source: SourceSpec) -> None:
    """Packs every split of a source in one way, beside the plans that are there.

    Where that leaves a split of text without one full block, the whole source is packed, and the share `holdout` of its
    blocks, at least one, is cut off the end for test and again for validation.

    Args:
      store_folder: of a store that is complete; has the name of its source.
      spec: how to pack.
      source: what the store was made from.

    Raises:
      DataError: too little for a block in every split, or a document that is too long to be packed whole.
    """
    store, name = open_store(store_folder), store_folder.name
    lengths = store.index["length"]
    if isinstance(source, RetrievalSourceSpec) and lengths.max() > spec.block_len:
        raise DataError(
            f"The longest document of {name} has {lengths.max()} ids with bos and eos, more than the {spec.block_len} "
            "of a block (seq_len + 1), and must not be cut: raise seq_len, or lower num_facts, questions_per_fact (for "
            "training) or num_eval_facts (held out) of data.retrieval."
        )
    place = plan_folder(store_folder, spec)
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    one_each = isinstance(spec, ChatPlanSpec) and not spec.packed
    with contextlib.nullcontext(plans.one_each) if one_each else _packer(spec.packing, len(store)) as pack:
        if isinstance(spec, ChatPlanSpec):
            split_by, (counts, first_skipped_line) = "document", _pack_samples(pack, partial, store, spec)
        else:
            split_by, counts = _pack(pack, partial, store, spec, source)
    for split in SPLITS:
        is_of_split = store.index["split"] == SPLITS.index(split)
        tokens = int(np.sum(lengths, where=is_of_split, dtype=np.int64))
        counts[split]["mean_document_tokens"] = round(tokens / max(1, int(np.count_nonzero(is_of_split))), 1)
        _log.info("packed %s-%s: %s", name, split, ", ".join(f"{k} {v:,}" for k, v in counts[split].items()))
    # Not all that decides on blocks is in the spec: the holdout of a cut by blocks, or the version of grain.
    digest = hash_of_files(partial / f"{split}.{kind}" for split in SPLITS for kind in ("slices", "bounds"))
    manifest: dict[str, Any] = {
        "options": dataclasses.asdict(spec),
        "sha256": digest,
        "split_by": split_by,
        "splits": counts,
    }
    if isinstance(spec, ChatPlanSpec):
        manifest["first_skipped_line"] = first_skipped_line
    write_manifest(partial, manifest)
    partial.rename(place)


@contextlib.contextmanager
def _packer(packing: str, num_documents: int) -> Iterator[Callable[..., Iterator[plans.Plan]]]:
    """What plans ranges of documents; best fit on all cores where there are ranges for them."""
    workers = min(len(os.sched_getaffinity(0)), num_documents // _RANGE)
    if packing != "best_fit":
        yield plans.concat
    elif workers < 2:
        yield plans.best_fit
    else:
        with worker_pool(workers) as pool:
            yield functools.partial(plans.best_fit, each=functools.partial(map_ahead, pool, 2 * workers))


def _pack_samples(
    pack: Callable[..., Iterator[plans.Plan]], partial: Path, store: Store, spec: ChatPlanSpec
) -> tuple[dict[str, Any], int]:
    """Saves the plans of all splits of conversations.

    Returns:
      The counts of each split, and the line of the first record that was left out; 0 for none, or none that is known.
    """
    name, counts = store.folder.name, {}
    lines = []
    for split in SPLITS:
        slices, of_samples, skipped_lines = plan_pieces(store, split, spec)
        lines += skipped_lines.tolist()
        if not len(slices):
            raise DataError(
                f"The source {name} has no conversation for {split} among its {len(store):,}: raise data.holdout, or "
                f"name files to hold out in data.sources.{name}.validation."
            )
        lengths = np.zeros(int(slices["document"].max()) + 1, np.uint32)
        lengths[slices["document"]] = slices["length"]
        ranges = (slices[first : first + _RANGE] for first in range(0, len(slices), _RANGE))
        saved = plans.save(partial, split, pack(ranges, spec.block_len), lengths, spec.block_len)
        counts[split] = {key: saved[key] for key in ("blocks", "tokens", "padding_share")} | of_samples
    if spec.arrangement == "concat" and (without := counts["train"]["without_room"]):
        _log.warning("%s: %d samples have no room for their copy in a row, and are trained without it", name, without)
    return counts, min(lines, default=0)


def check_skipped(store_folder: Path, spec: ChatPlanSpec, max_skipped: int) -> None:
    """Stops where too many samples are longer than a block and left out, bad records counted too.

    Raises:
      DataError: naming their number, and the line of the first.
    """
    plan = read_manifest(plan_folder(store_folder, spec))
    skipped = sum(counts["skipped"] for counts in plan["splits"].values())
    bad = sum(read_manifest(store_folder)["skipped"].values())
    if skipped and skipped + bad > max_skipped:
        first = f" (the first on line {plan['first_skipped_line']} of its file)" if plan["first_skipped_line"] else ""
        raise DataError(
            f"{skipped} conversations of {store_folder.name}{first} have more tokens than a block of {spec.block_len} "
            f"(seq_len + 1); with {bad} bad records that is more than data.max_skipped = {max_skipped}: raise seq_len, "
            "or set sft.too_long=truncate."
        )


def _pack(
    pack: Callable[..., Iterator[plans.Plan]], partial: Path, store: Store, spec: PlanSpec, source: SourceSpec
) -> tuple[str, dict[str, Any]]:
    """Saves the plans of all splits; returns what was split, document or block, and the counts of each split."""
    name, lengths, block_len = store.folder.name, store.index["length"], spec.block_len
    counts = {}
    for split in SPLITS:
        counts[split] = plans.save(partial, split, pack(_ranges(store, split, spec), block_len), lengths, block_len)
    empty = [split for split in SPLITS if not counts[split]["blocks"]]
    if not empty:
        return "document", counts
    if isinstance(source, RetrievalSourceSpec):
        raise DataError(
            f"The source {name} has no document left for {empty[0]}: all of them stand in another split; raise "
            "num_keys, num_values or num_facts."
        )
    _check_may_be_cut(store, spec, source, empty)
    # Documents that were to be held out come last: they fill the end that is cut off.
    ranges = chain.from_iterable(_ranges(store, split, spec) for split in SPLITS)
    plans.save(partial, "all", pack(ranges, block_len), lengths, block_len)
    for split, plan in _cut_by_blocks(plans.load(partial, "all"), store.folder, block_len, source.holdout):
        counts[split] = plans.save(partial, split, [plan], lengths, block_len)
    for kind in ("slices", "bounds"):
        (partial / f"all.{kind}").unlink()
    return "block", counts


def _check_may_be_cut(store: Store, spec: PlanSpec, source: SourceSpec, empty: Sequence[str]) -> None:
    """Stops where a cut by blocks would train on what was held out, or more than was asked for."""
    name, block = store.folder.name, f"a block of {spec.block_len} ids (seq_len + 1)"
    group = f"data.sources.{name}"
    validation = source.validation if isinstance(source, TextSourceSpec) else ""
    if validation and empty != ["train"]:
        held_out = [split for split in empty if split != "train"]
        raise DataError(
            f"{group}.validation is {validation!r}, but its text doesn't fill {block} in "
            f"{' and '.join(held_out)}, which get half of it each: give more of it, or lower seq_len."
        )
    if "train" in empty and (spec.max_tokens or spec.long_from):
        left = sum(int(slices["length"].sum(dtype=np.int64)) for slices in _ranges(store, "train", spec))
        raise DataError(
            f"The source {name} has {left:,} tokens for training, less than {block}: raise {group}.max_tokens "
            f"({spec.max_tokens}) or keep_shorter ({spec.keep_shorter:g}), or lower long_from "
            f"({spec.long_from}) or seq_len."
        )
    if "train" in empty and validation:
        raise DataError(f"The source {name} is too small: without its validation text it doesn't fill {block}.")


def _ranges(store: Store, split: str, spec: PlanSpec) -> Iterable[np.ndarray]:
    """The documents of a split that are to be packed, a range at a time."""
    indices = ((first, store.index[first : first + _RANGE]) for first in range(0, len(store), _RANGE))
    found = ((first, index, np.flatnonzero(index["split"] == SPLITS.index(split))) for first, index in indices)
    ranges: Iterable[np.ndarray] = (plans.whole(first + i, index["length"][i]) for first, index, i in found)
    if split != "train":
        return ranges
    if spec.long_from:
        ranges = plans.keep_long(ranges, long_from=spec.long_from, keep_shorter=spec.keep_shorter, seed=spec.seed)
    return plans.first_tokens(ranges, spec.max_tokens)


def _cut_by_blocks(
    plan: plans.Plan, store_folder: Path, block_len: int, holdout: float
) -> Iterator[tuple[str, plans.Plan]]:
    if len(plan) < len(SPLITS):
        raise DataError(
            f"The source {store_folder.name} is too small: its text makes {len(plan)} full blocks of {block_len} ids "
            f"(seq_len + 1), and each of {', '.join(SPLITS)} needs one. Lower seq_len, or give more text and delete "
            f"{store_folder}."
        )
    held = max(1, int(holdout * len(plan)))
    cuts = (0, len(plan) - 2 * held, len(plan) - held, len(plan))
    for i, split in enumerate(SPLITS):
        yield split, plan.between(cuts[i], cuts[i + 1])
