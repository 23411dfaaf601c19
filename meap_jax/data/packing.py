"""How the splits of a source are packed, as its options say; the packing itself is in `plans`."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from meap_jax.data import plans
from meap_jax.data.documents import DataError
from meap_jax.data.manifest import write_manifest
from meap_jax.data.prepared import open_store, plan_folder
from meap_jax.data.store import SPLITS, Store, save_array

_log = logging.getLogger(__name__)


def make_plans(source: Path, name: str, plan: Mapping[str, Any], source_options: Mapping[str, Any]) -> None:
    """Packs every split of a source in one way."""
    store = open_store(source)
    place = plan_folder(source, plan)
    made, split_by = _pack(store, name, plan, source_options)
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    counts: dict[str, Any] = {}
    for split, (packed, documents) in made.items():
        save_array(partial / f"{split}.pieces.npy", packed.pieces)
        save_array(partial / f"{split}.bounds.npy", packed.bounds)
        lengths = store.index["length"][documents]
        counts[split] = plans.statistics(packed, documents, lengths, plan["seq_len"] + 1)
        _log.info("packed %s-%s: %s", name, split, counts[split])
    write_manifest(partial, {"options": dict(plan), "split_by": split_by, "splits": counts})
    partial.rename(place)


def _pack(
    store: Store, name: str, plan: Mapping[str, Any], source_options: Mapping[str, Any]
) -> tuple[dict[str, tuple[plans.Plan, np.ndarray]], str]:
    """Plans and the documents they were made from, by split, and what splits are made of: document or block."""
    block_len = plan["seq_len"] + 1
    is_whole = source_options["kind"] == "retrieval"
    pack = plans.best_fit if plan["packing"] == "best_fit" else plans.concat
    lengths = np.asarray(store.index["length"], np.int64)
    if is_whole and lengths.max() > block_len:
        raise DataError(
            f"The longest document of {name} has {lengths.max()} ids with bos and eos, more than the {block_len} of a "
            "block (seq_len + 1), and must not be cut: raise seq_len, or lower num_facts, questions_per_fact (for "
            "training) or num_eval_facts (held out) of data.retrieval."
        )
    documents = {split: store.documents(split) for split in SPLITS}
    kept = documents["train"]
    if plan["long_from"]:
        kept = plans.keep_long(
            kept, lengths[kept], long_from=plan["long_from"], keep_shorter=plan["keep_shorter"], seed=plan["seed"]
        )
    documents["train"] = plans.first_tokens(kept, lengths[kept], plan["max_tokens"])
    made = {split: (pack(numbers, lengths[numbers], block_len), numbers) for split, numbers in documents.items()}
    if all(len(packed) for packed, _ in made.values()):
        return made, "document"
    if is_whole:
        empty = next(split for split, (packed, _) in made.items() if not len(packed))
        raise DataError(
            f"The source {name} has no document left for {empty}: all of them stand in another split; raise num_keys, "
            "num_values or num_facts."
        )
    # Documents that were to be held out come last: they fill the end that is cut off.
    everything = np.concatenate(list(documents.values()))
    packed = pack(everything, lengths[everything], block_len)
    if len(packed) < len(SPLITS):
        raise DataError(
            f"The source {name} has {lengths[everything].sum()} tokens, too few for one block of {block_len} "
            f"(seq_len + 1) in each of {', '.join(SPLITS)}: give more text or lower seq_len."
        )
    held = max(1, int(source_options.get("holdout", 0) * len(packed)))
    cuts = (0, len(packed) - 2 * held, len(packed) - held, len(packed))
    parts = {split: packed.part(cuts[i], cuts[i + 1]) for i, split in enumerate(SPLITS)}
    return {split: (part, np.unique(part.pieces["document"])) for split, part in parts.items()}, "block"
