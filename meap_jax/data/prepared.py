"""What training and evaluation read: a folder of tokenized sources, opened for one way of packing them."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meap_jax import tokenizers
from meap_jax.data import plans as plans_lib
from meap_jax.data.manifest import LAYOUT_VERSION, hash_of, read_manifest
from meap_jax.data.spec import DataSpec, PlanSpec
from meap_jax.data.store import SPLITS, Store, ids_dtype, shard_file
from meap_jax.errors import DataError
from meap_jax.tokenizers import Tokenizer

# One record an answer: block[row, start : start + length] are its ids; see `store.ANSWER_DTYPE`.
ROW_ANSWER_DTYPE = np.dtype([
    ("row", "<i4"), ("start", "<i4"), ("length", "<i4"), ("depth", "<f4"), ("distance", "<i4")
])  # fmt: skip


class Blocks:
    """The blocks of a source and split, in the order of its plan; any of them at once."""

    def __init__(self, store: Store, plan: plans_lib.Plan, block_len: int, pad_id: int, *, is_one_segment: bool):
        """A plan's blocks over a store's documents; `is_one_segment`: no mask between the documents of a block."""
        self._store, self._pad_id = store, pad_id
        self._plan = plans_lib.Plan(*map(np.asarray, plan))  # Slices of a memmap take their time.
        self.block_len, self.is_one_segment = block_len, is_one_segment

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        """A block as `tokens` and `segment_ids`, [block_len] int32: 1, 2, ... for its documents, 0 for padding.

        Raises:
          DataError: it can't be read.
        """
        first, last = self._plan.bounds[index : index + 2]
        pieces = self._plan.pieces[first:last].tolist()
        documents = self._store.read([document for document, _, _ in pieces])
        tokens = np.full(self.block_len, self._pad_id, np.int32)
        segment_ids = np.zeros(self.block_len, np.int32)
        end = 0
        for segment, ((_, skip, length), ids) in enumerate(zip(pieces, documents, strict=True), 1):
            start, end = end, end + length
            tokens[start:end] = ids[skip : skip + length]
            segment_ids[start:end] = 1 if self.is_one_segment else segment
        return {"tokens": tokens, "segment_ids": segment_ids}

    def rows(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Blocks start ... stop - 1, stacked: [stop - start, block_len] each."""
        rows = [self[i] for i in range(start, stop)]
        return {name: np.stack([row[name] for row in rows]) for name in ("tokens", "segment_ids")}

    @property
    def answers(self) -> np.ndarray:
        """What these blocks are asked: [number of answers] of ROW_ANSWER_DTYPE, ordered by row and start.

        Answers of documents that are not in the plan are left out; documents with answers are never cut.
        """
        answers = self._store.answers
        pieces, bounds = self._plan
        if not len(answers) or not len(pieces):
            return np.zeros(0, ROW_ANSWER_DTYPE)
        row_of_piece = np.repeat(np.arange(len(self)), np.diff(bounds))
        lengths = pieces["length"].astype(np.int64)
        before = np.cumsum(lengths) - lengths  # Ids in front of each piece, of all blocks ...
        start_in_row = before - before[bounds[:-1]][row_of_piece]  # ... and of its own block.
        order = np.argsort(pieces["document"])
        place = np.searchsorted(pieces["document"], answers["document"], sorter=order)
        piece = order[np.minimum(place, len(order) - 1)]
        is_here = pieces["document"][piece] == answers["document"]
        answers, piece = answers[is_here], piece[is_here]
        out = np.empty(len(answers), ROW_ANSWER_DTYPE)
        out["row"], out["start"] = row_of_piece[piece], start_in_row[piece] + answers["start"]
        for field in ("length", "depth", "distance"):
            out[field] = answers[field]
        return np.sort(out, order=("row", "start"))


@dataclass(frozen=True)
class Prepared:
    """A prepared folder that was found to be complete, with the plans of one config."""

    folder: Path
    tokenizer: Tokenizer
    tokenizer_hash: str  # SHA-256 of its files: equal hashes, equal meaning of every id.
    spec: DataSpec

    @property
    def block_len(self) -> int:
        """Ids in a block, seq_len + 1."""
        return next(iter(self.spec.plans.values())).block_len

    @property
    def sources(self) -> list[str]:
        """Their names."""
        return list(self.spec.plans)

    def manifest(self, name: str) -> dict[str, Any]:
        """What was read of a source."""
        return read_manifest(self.folder / name)

    def plan_manifest(self, name: str) -> dict[str, Any]:
        """What its plan came to, by split."""
        return read_manifest(plan_folder(self.folder / name, self.spec.plans[name]))

    def counts(self, name: str) -> dict[str, Any]:
        """What a source came to: documents, tokens and bad records in all, and its blocks by split."""
        manifest, plan = self.manifest(name), self.plan_manifest(name)
        return {key: manifest[key] for key in ("documents", "tokens", "skipped")} | {
            key: plan[key] for key in ("split_by", "splits")
        }

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer, every document and every block's place; not of paths, dates or the Python version."""
        content = {
            "layout_version": LAYOUT_VERSION,
            "tokenizer": self.tokenizer_hash,
            "sources": {
                name: [self.manifest(name)["fingerprint"], self.plan_manifest(name)["sha256"], asdict(plan)]
                for name, plan in sorted(self.spec.plans.items())
            },
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def blocks(self, name: str, split: str) -> Blocks:
        """The blocks of a source and split (train, validation, test).

        Raises:
          DataError: the folder was not prepared for them.
        """
        if name not in self.spec.plans or split not in SPLITS:
            raise DataError(
                f"The prepared folder {self.folder} was not opened for {name}-{split}, only for "
                f"{', '.join(self.spec.plans)} with {', '.join(SPLITS)}."
            )
        return Blocks(
            open_store(self.folder / name),
            self._plan(name, split),
            self.block_len,
            self.tokenizer.pad_id,
            is_one_segment=not self.spec.plans[name].separates_documents,
        )

    def _plan(self, name: str, split: str) -> plans_lib.Plan:
        folder = plan_folder(self.folder / name, self.spec.plans[name])
        told = self.plan_manifest(name)["splits"][split]["blocks"]
        try:
            plan = plans_lib.load(folder, split)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} is damaged ({error}): delete it to make it again.") from error
        if len(plan) != told or (told and plan.bounds[-1] != len(plan.pieces)):
            raise DataError(f"{folder} is damaged: its {split} has not the {told} blocks of its manifest. Delete it.")
        return plan


def plan_folder(store_folder: Path, plan: PlanSpec) -> Path:
    """Where a source's plan lies: its name tells the packing, the block and the rest as a hash."""
    digest = hashlib.sha256(json.dumps(asdict(plan), sort_keys=True).encode()).hexdigest()[:8]
    return store_folder / "plans" / f"{plan.packing}-{plan.block_len}-{digest}"


def open_tokenizer(folder: Path) -> tuple[Tokenizer, str]:
    """The tokenizer of a prepared folder, and the SHA-256 of its files.

    Raises:
      DataError: it isn't the one that the manifest names.
    """
    manifest = read_manifest(folder)
    content = {}
    for name in manifest["files"]:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing: delete {folder} to prepare it again.")
        content[name] = (folder / name).read_bytes()
    found = hash_of(content)
    if found != manifest["tokenizer_hash"]:
        raise DataError(
            f"{folder} holds another tokenizer ({found[:12]}) than its data was made with "
            f"({manifest['tokenizer_hash'][:12]}): {', '.join(content)} is damaged; delete {folder} to prepare it "
            "again."
        )
    return tokenizers.load(folder), found


def open_store(folder: Path) -> Store:
    """The documents of a source.

    Raises:
      DataError: a file is missing or has another size than the manifest says.
    """
    manifest = read_manifest(folder)
    sizes = {shard_file(folder, i).name: shard["bytes"] for i, shard in enumerate(manifest["shards"])}
    sizes |= manifest["files"]
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"{file} is missing: delete {folder} to prepare it again.")
        if file.stat().st_size != size:
            raise DataError(f"{file} is damaged: delete {folder} to prepare it again.")
    shards = [shard["documents"] for shard in manifest["shards"]]
    try:
        return Store(folder, shards, ids_dtype(manifest["num_tokens"]))
    except (ValueError, EOFError) as error:  # What numpy raises for an index that isn't one.
        raise DataError(f"{folder / 'index.npy'} is damaged: delete {folder} to prepare it again.") from error
