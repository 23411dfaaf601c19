"""What training and evaluation read: a folder of tokenized sources, opened for one way of packing them."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meap_jax import tokenizers
from meap_jax.data import plans as plans_lib
from meap_jax.data.manifest import damaged, hash_of, read_manifest
from meap_jax.data.samples import SampleBlocks, spec_of
from meap_jax.data.spec import ChatPlanSpec, DataSpec, PlanSpec
from meap_jax.data.store import SPAN_DTYPE, SPLITS, Store, ids_dtype, shard_file
from meap_jax.errors import ConfigError, DataError
from meap_jax.fields import roles_of
from meap_jax.rows import Row
from meap_jax.tokenizers import Tokenizer

# Part of the fingerprint by which a run knows its data. Change it only when the same ids and blocks mean something
# else, not with the files' layout, so that a run goes on after its data was prepared again.
_FINGERPRINT_VERSION = 3
# A record of `Blocks.spans`, without the columns of its role: block[row, start : start + length] are its ids.
ROW_SPAN_DTYPE = np.dtype([("row", "<i4"), ("document", "<u4"), ("start", "<i4"), ("length", "<i4")])


class Blocks:
    """The blocks of a source and split, in the order of its plan; any of them at once."""

    def __init__(
        self,
        store: Store,
        plan: plans_lib.Plan,
        block_len: int,
        pad_id: int,
        *,
        is_one_segment: bool,
        where: str = "all",
    ):
        """A plan's blocks over a store's documents.

        Args:
          store, plan, block_len, pad_id: what blocks are made of.
          is_one_segment: no mask between the documents of a block.
          where: which tokens may be masked, as in `objective.where`.
        """
        self._store, self._pad_id = store, pad_id
        self._word, roles = roles_of(where)
        columns = SPAN_DTYPE.names or ()
        self._named = [[np.ascontiguousarray(store.spans(role)[column]) for column in columns] for role in roles]
        self._plan = plans_lib.Plan(*map(np.asarray, plan))  # Slices of a memmap take their time.
        self.block_len, self.is_one_segment = block_len, is_one_segment

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: Any) -> Row:
        """A block as `tokens` and `segment_ids`, [block_len] int32: 1, 2, ... for its documents, 0 for padding.

        And `maskable`, [block_len] bool, unless masks may fall everywhere.

        Raises:
          DataError: it can't be read.
        """
        first, last = self._plan.bounds[index : index + 2]
        slices = self._plan.slices[first:last].tolist()
        documents = self._store.read([document for document, _, _ in slices])
        tokens = np.full(self.block_len, self._pad_id, np.int32)
        segment_ids = np.zeros(self.block_len, np.int32)
        maskable = None if self._word == "all" else np.zeros(self.block_len, bool)
        end = 0
        for segment, ((document, skip, length), ids) in enumerate(zip(slices, documents, strict=True), 1):
            start, end = end, end + length
            if end > self.block_len or skip + length > len(ids):
                raise DataError(f"the plans in {self._store.folder} are damaged at block {index}: delete its plans/.")
            tokens[start:end] = ids[skip : skip + length]
            segment_ids[start:end] = 1 if self.is_one_segment else segment
            if maskable is not None:
                maskable[start:end] = self._maskable(document, len(ids))[skip : skip + length]
        return Row(tokens, segment_ids, maskable=maskable)

    def _maskable(self, document: int, length: int) -> np.ndarray:
        """Which of the tokens of a document may be masked; [length] bool."""
        is_named = np.zeros(length, bool)
        for documents, starts, sizes in self._named:
            own = slice(*np.searchsorted(documents, np.array([document, document + 1], documents.dtype)))
            for start, size in zip(starts[own].tolist(), sizes[own].tolist(), strict=True):
                is_named[start : start + size] = True
        return is_named if self._word == "only" else ~is_named

    def spans(self, role: str) -> np.ndarray:
        """The places of a role's spans in these blocks.

        Returns:
          [number of spans] records of ROW_SPAN_DTYPE and the role's columns, ordered by row and start. A span that is
          cut with its document has a record in each block; one that is in no block has none.
        """
        spans, (slices, bounds) = self._store.spans(role), self._plan
        order = np.lexsort((slices["start"], slices["document"]))
        starts, ends = _extent(slices[order])
        span_starts, span_ends = _extent(spans)
        first = np.searchsorted(ends, span_starts, side="right")  # The first slice that ends behind the start ...
        stop = np.searchsorted(starts, span_ends, side="left")  # ... and the first that doesn't start before its end.
        counts = np.maximum(stop - first, 0)
        which = np.repeat(np.arange(len(spans)), counts)
        nth = np.arange(len(which)) - (np.cumsum(counts) - counts)[which]
        place = first[which] + nth

        lengths = slices["length"].astype(np.int64)
        before = np.cumsum(lengths) - lengths  # Ids in front of each slice, of all blocks ...
        row = np.repeat(np.arange(len(self)), np.diff(bounds))
        start_in_row = before - before[bounds[:-1]][row]  # ... and of its own block.

        out = np.empty(len(which), ROW_SPAN_DTYPE.descr + spans.dtype.descr[len(SPAN_DTYPE.descr) :])
        for name in spans.dtype.names or ():
            out[name] = spans[name][which]
        begin = np.maximum(span_starts[which], starts[place])
        out["row"] = row[order[place]]
        out["start"] = start_in_row[order[place]] + (begin - starts[place]).astype(np.int64)
        out["length"] = np.minimum(span_ends[which], ends[place]) - begin
        return out[np.lexsort((out["start"], out["row"]))]


AnyBlocks = Blocks | SampleBlocks


def _extent(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where slices or spans start and end, as uint64 that ascend from document to document and in each."""
    starts = (records["document"].astype(np.uint64) << np.uint64(32)) + records["start"]
    return starts, starts + records["length"]


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
        """The names of the sources."""
        return list(self.spec.plans)

    def check_mask_id(self, mask_id: int) -> None:
        """Stops a config whose [MASK] is not the tokenizer's.

        Raises:
          ConfigError: naming both.
        """
        if self.tokenizer.mask_id != mask_id:
            raise ConfigError(
                f"objective.mask_id is {mask_id}, but [MASK] of the tokenizer in {self.folder} is "
                f"{self.tokenizer.mask_id}."
            )

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of a source: its options and counts."""
        return read_manifest(self.folder / name)

    def plan_manifest(self, name: str) -> dict[str, Any]:
        """The manifest of its plan: counts by split."""
        return read_manifest(plan_folder(self.folder / name, self.spec.plans[name]))

    def blocks_an_epoch(self, name: str) -> int:
        """How many training blocks of a source make an epoch."""
        plan = self.spec.epoch_plans.get(name, self.spec.plans[name])
        return read_manifest(plan_folder(self.folder / name, plan))["splits"]["train"]["blocks"]

    def counts(self, name: str) -> dict[str, Any]:
        """Counts of a source: documents, tokens and bad records in all, and its blocks by split."""
        manifest, plan = self.manifest(name), self.plan_manifest(name)
        return {key: manifest[key] for key in ("documents", "tokens", "skipped")} | {
            key: plan[key] for key in ("split_by", "splits")
        }

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer, every document and every block's place; not of paths, dates or the Python version."""
        content = {
            "layout_version": _FINGERPRINT_VERSION,
            "tokenizer": self.tokenizer_hash,
            "sources": {
                name: [self.manifest(name)["fingerprint"], self.plan_manifest(name)["sha256"], asdict(plan)]
                for name, plan in sorted(self.spec.plans.items())
            },
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def blocks(self, name: str, split: str) -> AnyBlocks:
        """The blocks of a source and split (train, validation, test).

        Raises:
          DataError: the folder was not prepared for them.
          ConfigError: objective.where names a role of which no document of any source has spans.
        """
        if name not in self.spec.plans or split not in SPLITS:
            raise DataError(
                f"The prepared folder {self.folder} was not opened for {name}-{split}, only for "
                f"{', '.join(self.spec.plans)} with {', '.join(SPLITS)}."
            )
        store, plan, spec = open_store(self.folder / name), self._plan(name, split), self.spec.plans[name]
        if isinstance(spec, ChatPlanSpec):
            return SampleBlocks(store, plan, spec_of(split, spec), self.spec.samples, self.tokenizer.pad_id)
        self._check_roles()
        sizes, is_one = (self.block_len, self.tokenizer.pad_id), not spec.separates_documents
        return Blocks(store, plan, *sizes, is_one_segment=is_one, where=self.spec.where)

    def _check_roles(self) -> None:
        """Stops masks on a role that no source has: a source may lack it where another has it."""
        _, roles = roles_of(self.spec.where)
        sources = self.spec.plans if roles else ()
        known = sorted({role for name in sources for role in open_store(self.folder / name).roles()})
        for role in roles:
            if role not in known:
                raise ConfigError(
                    f"objective.where is {self.spec.where!r}, but no document in {self.folder} has a span of the role "
                    f"{role!r}, only of {', '.join(known) or 'none'}: name another, or prepare the data anew in "
                    "another data.prepared if an older version made it."
                )

    def _plan(self, name: str, split: str) -> plans_lib.Plan:
        folder = plan_folder(self.folder / name, self.spec.plans[name])
        expected = self.plan_manifest(name)["splits"][split]["blocks"]
        try:
            plan = plans_lib.load(folder, split)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} is damaged ({error}): delete it to make it again.") from error
        if len(plan) != expected or (expected and plan.bounds[-1] != len(plan.slices)):
            raise DataError(f"{folder} is damaged: its {split} lacks the {expected} blocks of its manifest. Delete it.")
        return plan


def plan_folder(store_folder: Path, plan: PlanSpec) -> Path:
    """The folder of a source's plan: its name has the packing, the block length, and a hash of all options."""
    digest = hashlib.sha256(json.dumps(asdict(plan), sort_keys=True).encode()).hexdigest()[:8]
    return store_folder / "plans" / f"{plan.packing}-{plan.block_len}-{digest}"


def open_tokenizer(folder: Path) -> tuple[Tokenizer, str]:
    """The tokenizer of a prepared folder, and the SHA-256 of its files.

    Raises:
      DataError: it isn't the one that the manifest names.
    """
    manifest = read_manifest(folder)
    for name in manifest["files"]:
        if not (folder / name).is_file():
            raise damaged(folder / name)
    content = {name: (folder / name).read_bytes() for name in manifest["files"]}
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
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise damaged(folder / name)
    shards = [shard["documents"] for shard in manifest["shards"]]
    try:
        return Store(folder, shards, ids_dtype(manifest["num_tokens"]))
    except (ValueError, EOFError) as error:  # What numpy raises for an index that isn't one.
        raise damaged(folder / "index.npy") from error
