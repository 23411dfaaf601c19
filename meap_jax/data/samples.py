"""Samples of fine-tuning: which pieces a conversation gives, and what a piece is in a row.

A sample is a document with answers: spans of the role "answer", each with the token that ends it as its last. It gives
one piece or two, which are packed whole. What a copy of it repeats, with masks in its answers, is its *tail*: all from
the first answer on. What comes before is its prompt.

    clean           prompt, tail
    copy            prompt, tail with masks: the official code's second row, by itself
    shared_prefix   prompt, then the tail and the tail with masks as two branches that don't see each other
    concat          prompt, tail, tail with masks: each sees all before it (the paper, section 3 and Figure 2)

Each branch of `shared_prefix` begins with the last token of the prompt, which predicts the first of the tail: so every
target has a place of its own, and the result is that of `clean` and `copy`.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from meap_jax.data import plans
from meap_jax.data.spec import ChatPlanSpec, SampleSpec, sample_fields
from meap_jax.data.store import SPLITS, Store
from meap_jax.rows import Row, joined

ANSWER = "answer"  # The role of spans that are the assistant's words.
CLEAN, COPY, JOINT = range(3)  # What a piece is; JOINT: both, as `arrangement` says.


class Pieces(NamedTuple):
    """The pieces of a split, in the order in which they are packed."""

    slices: np.ndarray  # [P] of plans.SLICE_DTYPE; `document` is kind * (documents of the store) + document.
    counts: dict[str, int]  # Of samples: all, those with a copy, without room for one, truncated and skipped ones.
    skipped_lines: np.ndarray  # Of their records, where the store knows them.


def plan_pieces(store: Store, split: str, spec: ChatPlanSpec) -> Pieces:
    """The pieces that the samples of a split give, shuffled.

    Args:
      store: of conversations.
      split: a held-out one has clean pieces alone.
      spec: how they are arranged and packed.
    """
    spec = spec_of(split, spec)
    spans = store.spans(ANSWER)
    total = len(store)
    lengths = store.index["length"].astype(np.int64)
    first, has_long = _tails(spans, lengths, spec)
    documents = store.documents(split)
    is_long = lengths > spec.block_len
    skipped = documents[is_long[documents]] if spec.too_long == "skip" else documents[:0]
    documents = np.setdiff1d(documents, skipped)
    lengths = np.minimum(lengths, spec.block_len)

    tail = lengths - first
    joint = lengths + tail + (spec.arrangement == "shared_prefix")
    copied = has_long & (spec.arrangement != "none")
    fits = joint <= spec.block_len
    without_room = copied & ~fits & (spec.arrangement != "separate")
    if spec.arrangement == "concat":
        copied &= fits  # There is no other place for it.
    # Where the clean answers have no targets and no copy sees them, they are left out.
    needs_clean = spec.loss != "masked" or spec.arrangement == "concat"
    is_joint = copied & fits & (spec.arrangement != "separate") & needs_clean
    is_clean = ~is_joint if needs_clean else ~copied
    kinds = (
        (CLEAN, documents[is_clean[documents]], lengths),
        (COPY, documents[(copied & ~is_joint)[documents]], lengths),
        (JOINT, documents[is_joint[documents]], joint),
    )
    slices = np.concatenate([plans.whole(kind * total + chosen, size[chosen]) for kind, chosen, size in kinds])
    # From uniform doubles alone: NumPy may change the streams of permutation between releases.
    order = np.argsort(np.random.default_rng((spec.seed, SPLITS.index(split))).random(len(slices)), kind="stable")
    counts = dict(
        samples=len(documents),
        with_copy=int(np.count_nonzero(copied[documents])),
        without_room=int(np.count_nonzero(without_room[documents])),
        truncated=int(np.count_nonzero(is_long[documents])),
        skipped=len(skipped),
    )
    return Pieces(slices[order], counts, _lines(spans, skipped))


def spec_of(split: str, spec: ChatPlanSpec) -> ChatPlanSpec:
    """How the samples of a split are arranged: held-out ones have no copies."""
    return spec if split == "train" else dataclasses.replace(spec, arrangement="none")


def _tails(spans: np.ndarray, lengths: np.ndarray, spec: ChatPlanSpec) -> tuple[np.ndarray, np.ndarray]:
    """Of each document, in a block: where its first answer starts, and whether one is long enough for masks."""
    cut = np.maximum(lengths - spec.block_len, 0)[spans["document"]]
    starts, sizes = kept_answers(spans["start"], spans["length"], cut)
    document = spans["document"][sizes > 0]
    starts, sizes = starts[sizes > 0], sizes[sizes > 0]
    first = np.minimum(lengths, spec.block_len)  # Without an answer the tail is empty.
    np.minimum.at(first, document, starts)
    has_long = np.zeros(len(lengths), bool)
    has_long[document[sizes - 1 > spec.longer_than]] = True
    return first, has_long


def kept_answers(starts: np.ndarray, sizes: np.ndarray, cut: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Where answers are when `cut` tokens behind bos are taken out; sizes of those that are gone are 0 or less."""
    starts, ends = starts.astype(np.int64) - cut, starts.astype(np.int64) + sizes - cut
    starts = np.maximum(starts, 1)
    return starts, ends - starts


def _lines(spans: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The lines of the records of documents, ascending; empty where they are not known."""
    if "line" not in (spans.dtype.names or ()):
        return np.zeros(0, np.int64)
    return np.unique(spans["line"][np.isin(spans["document"], documents)].astype(np.int64))


class SampleBlocks:
    """The blocks of a source of conversations, in the order of its plan; any of them at once."""

    def __init__(self, store: Store, plan: plans.Plan, spec: ChatPlanSpec, samples: SampleSpec, pad_id: int):
        """A plan's blocks over a store's documents; `spec` is that of the split."""
        self._store, self._pad_id = store, pad_id
        self._plan = plans.Plan(*map(np.asarray, plan))
        self._spans = np.asarray(store.spans(ANSWER))
        self._documents = np.ascontiguousarray(self._spans["document"])
        self._spec, self._samples, self.block_len = spec, samples, spec.block_len
        # Without copies a row says where evaluation may mask the answers themselves; training takes no notice of it.
        self.fields = {*sample_fields(spec.arrangement, samples), "maskable"}

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> Row:
        """A block as a row with `fields`, [block_len] each.

        Raises:
          DataError: it can't be read.
        """
        first, last = self._plan.bounds[index : index + 2]
        numbers = self._plan.slices["document"][first:last].astype(np.int64)
        kinds, documents = np.divmod(numbers, len(self._store))
        own = zip(kinds.tolist(), documents.tolist(), self._store.read(documents), strict=True)
        pieces = [self._piece(kind, document, ids, segment) for segment, (kind, document, ids) in enumerate(own, 1)]
        empty = np.zeros(self.block_len - sum(len(piece.tokens) for piece in pieces), np.int32)
        is_not, place = empty.astype(bool), np.arange(len(empty), dtype=np.int32)
        padding = Row(empty + self._pad_id, empty, place, place, empty, empty.astype(np.float32), is_not, is_not)
        return joined([*pieces, padding]).only(self.fields)

    def _piece(self, kind: int, document: int, ids: np.ndarray, segment: int) -> Row:
        """A piece of a document as a row of its own length."""
        cut = max(0, len(ids) - self.block_len)
        ids = np.concatenate([ids[:1], ids[1 + cut :]]).astype(np.int32)
        bounds = np.searchsorted(self._documents, [document, document + 1])
        own = self._spans[slice(*bounds)]
        starts, sizes = kept_answers(own["start"], own["length"], cut)
        is_target, is_long, maskable = np.zeros((3, len(ids)), bool)
        for answer, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
            is_target[start : start + max(size, 0)] = True
            if size - 1 > self._spec.longer_than:
                is_long[start : start + size] = True
                maskable[start + self._chosen(document, answer, size - 1)] = True
        index = np.arange(len(ids), dtype=np.int32)
        no, zeros = np.zeros(len(ids), bool), np.zeros(len(ids), np.int32)

        # The sample as it is, and its copy with masks.
        weights = is_target.astype(np.float32)
        in_clean = no if self._has_copies else maskable
        clean = Row(ids, zeros + segment, index, index, zeros, weights, in_clean, no)
        # Where the clean answers are left out, short ones are learned in the copy.
        leaves_out = self._spec.loss == "masked" and self._has_copies
        copy = clean._replace(maskable=maskable, is_copy=is_long if leaves_out and kind == COPY else ~no)
        if kind != JOINT:
            return copy if kind == COPY else clean

        # Both in one piece, in which the copy lacks what it shares with the sample.
        tail = int(starts[sizes > 0].min())
        if self._spec.arrangement == "shared_prefix":
            tail -= 1  # The last token of the prompt is in both branches.
            clean = clean._replace(branch_ids=(index >= tail).astype(np.int32))
            copy = copy._replace(branch_ids=zeros + 2)
        else:
            behind = index + (len(ids) - tail)
            copy = copy._replace(
                positions=behind, rope_positions=behind if self._samples.positions == "run_on" else index
            )
            if leaves_out:
                clean = clean._replace(loss_weights=weights * ~is_long)
        return joined([clean, copy.behind(tail)])

    @property
    def _has_copies(self) -> bool:
        return self._spec.arrangement != "none"

    def _chosen(self, document: int, answer: int, size: int) -> np.ndarray:
        """Which of an answer's `size` tokens may be masked: all, or with static masks those that are."""
        if self._samples.masks == "fresh" or not self._has_copies:
            return np.arange(size)
        if not self._samples.mask_ratio:
            return np.arange(0)
        draws = np.random.default_rng((self._samples.seed, document, answer)).random(size)
        return np.argsort(draws, kind="stable")[: max(1, int(self._samples.mask_ratio * size))]
