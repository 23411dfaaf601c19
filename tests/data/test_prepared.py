"""Spans of documents, as spans of blocks and as places where masks may fall."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_data
from meap_jax.data import plans
from meap_jax.data.prepared import Blocks
from meap_jax.data.store import EncodedDocument, TokenSpan


@st.composite
def documents(draw):
    """Documents whose ids are all different, each with some spans of a role."""
    made, first = [], 1
    for length in draw(st.lists(st.integers(1, 12), min_size=1, max_size=6)):
        starts = draw(st.lists(st.integers(0, length - 1), max_size=3))
        ends = [draw(st.integers(start + 1, length)) for start in starts]
        spans = (TokenSpan(s, e - s, "loss", {"turn": i}) for i, (s, e) in enumerate(zip(starts, ends, strict=True)))
        made.append(EncodedDocument(list(range(first, first + length)), tuple(spans)))
        first += length
    return made


@pytest.mark.parametrize("pack", [plans.concat, plans.best_fit])
@settings(max_examples=20, deadline=None)
@given(documents(), st.integers(2, 15), st.sampled_from(["all", "only:loss", "never:loss", "only:loss,fact"]))
def test_masks_may_fall_on_tokens_of_the_roles_alone_or_on_all_but_these(pack, made, block_len, where):
    made = [doc._replace(spans=(*doc.spans, TokenSpan(len(doc.ids) - 1, 1, "fact"))) for doc in made]
    lengths = np.array([len(document.ids) for document in made], np.int64)
    [plan] = pack([plans.whole(np.arange(len(made)), lengths)], block_len)
    with tempfile.TemporaryDirectory() as folder:
        store = tiny_data.make_store(Path(folder), [[(0, document)] for document in made])
        blocks = Blocks(store, plan, block_len, 0, is_one_segment=False, where=where)
        rows = [blocks[i] for i in range(len(blocks))]
    if where == "all":
        assert all(row.maskable is None for row in rows)
        return
    named = {
        document.ids[i]  # All ids are different, and none is that of padding.
        for document in made
        for span in document.spans
        if span.role in where
        for i in range(span.start, span.start + span.length)
    }
    for row in rows:
        assert row.maskable.dtype == bool
        expected = [bool(i) and (i in named) == where.startswith("only") for i in row.tokens.tolist()]
        assert row.maskable.tolist() == expected


@pytest.mark.parametrize("pack", [plans.concat, plans.best_fit])
@settings(max_examples=50, deadline=None)
@given(documents(), st.integers(2, 15), st.data())
def test_spans_hold_the_same_ids_in_blocks_as_in_their_documents(pack, made, block_len, data):
    kept = sorted(data.draw(st.sets(st.sampled_from(range(len(made))))))
    lengths = np.array([len(made[i].ids) for i in kept], np.int64)
    [plan] = pack([plans.whole(np.array(kept, np.int64), lengths)], block_len)
    with tempfile.TemporaryDirectory() as folder:
        store = tiny_data.make_store(Path(folder), [[(0, document)] for document in made])
        blocks = Blocks(store, plan, block_len, 0, is_one_segment=False)
        rows, spans = [blocks[i].tokens.tolist() for i in range(len(blocks))], blocks.spans("loss")
    found = {}
    for span in spans:
        ids = rows[span["row"]][span["start"] : span["start"] + span["length"]]
        found[span["document"], span["turn"]] = found.get((span["document"], span["turn"]), set()) | set(ids)
    there = set().union(*rows)
    for i, document in enumerate(made):
        for span in document.spans:
            wanted = there & set(document.ids[span.start : span.start + span.length])
            assert found.pop((i, span.columns["turn"]), set()) == wanted
    assert not found and spans[["row", "start"]].tolist() == sorted(spans[["row", "start"]].tolist())
