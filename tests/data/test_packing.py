"""Documents become blocks of one length."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meap_jax.data.documents import (
    AnswerSpan,
    DataError,
    Document,
    EncodedDocument,
    encode_documents,
)
from meap_jax.data.packing import pack_concat, pack_source, pack_whole, smallest_dtype
from meap_jax.data.retrieval import KEYS, RetrievalSpec, generate
from meap_jax.data.sources import Source
from meap_jax.data.tokenizers import train_bpe

bpe = train_bpe((d.text for d in generate(RetrievalSpec(16, 16, 4, 1, 2), 0, 200)), 500)
ids = st.lists(st.integers(1, 60_000), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(st.lists(ids), st.integers(1, 9), st.sampled_from([np.int32, np.uint16, np.uint32]))
def test_concat_keeps_every_token_in_order_but_the_tail(documents, block_len, dtype):
    packed = pack_concat(iter(documents), block_len, dtype)
    stream = sum(documents, [])
    kept = len(stream) // block_len * block_len
    assert packed.tokens.shape == packed.segment_ids.shape == (kept // block_len, block_len)
    assert packed.tokens.dtype == dtype
    assert packed.tokens.ravel().tolist() == stream[:kept]
    assert packed.num_dropped == len(stream) - kept
    assert np.all(packed.segment_ids == 1)


@settings(max_examples=100, deadline=None)
@given(st.lists(ids), st.integers(12, 30))
def test_whole_loses_no_document_and_cuts_none(documents, block_len):
    packed = pack_whole((EncodedDocument(d) for d in documents), block_len, pad_id=0)
    found = []
    for row, segments in zip(packed.tokens, packed.segment_ids, strict=True):
        last = segments.max()
        assert last > 0 and np.all(row[segments == 0] == 0)
        # 1, 1, 2, 2, 2, 3, 0, 0: no gap inside a block, padding only behind.
        assert np.all(np.diff(segments[segments > 0]) >= 0)
        assert np.all(segments[np.count_nonzero(segments) :] == 0)
        found += [tuple(row[segments == s].tolist()) for s in range(1, last + 1)]
    assert Counter(found) == Counter(map(tuple, documents))
    assert packed.num_dropped == 0


def test_whole_puts_each_document_into_the_first_block_with_room():
    lengths = [6, 5, 3, 4, 2]
    packed = pack_whole((EncodedDocument([n] * n) for n in lengths), 10, pad_id=0)
    assert packed.tokens.tolist() == [
        [6, 6, 6, 6, 6, 6, 3, 3, 3, 0],
        [5, 5, 5, 5, 5, 4, 4, 4, 4, 0],
        [2, 2, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert packed.segment_ids[0].tolist() == [1] * 6 + [2] * 3 + [0]


def test_a_document_longer_than_a_block_is_named_with_both_lengths():
    with pytest.raises(DataError, match="Document 1 has 11 ids .* the 10 of a block"):
        pack_whole([EncodedDocument([1]), EncodedDocument([1] * 11)], 10, pad_id=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(120, 400))
def test_answer_spans_point_at_the_answer_wherever_its_document_went(seed, num_docs, block_len):
    documents = list(generate(RetrievalSpec(16, 16, 4, 0.75, 2), seed, num_docs))
    packed = pack_whole(encode_documents(documents, bpe), block_len, bpe.pad_id, np.uint16)
    values = [d.pieces[a.piece] for d in documents for a in d.answers]
    found = []
    for row, start, length, _, distance in packed.answers.tolist():
        answer = packed.tokens[row, start : start + length]
        fact = packed.tokens[row, start - distance : start - distance + length]
        assert answer.tolist() == fact.tolist()
        assert packed.segment_ids[row, start] == packed.segment_ids[row, start - distance]
        # A fact says "is falcon", a question "harbor falcon".
        assert bpe.decode(packed.tokens[row, start - distance - 1 : start - distance]) == " is"
        assert bpe.decode(packed.tokens[row, :start]).split()[-1] in KEYS
        found.append(bpe.decode(answer))
    assert Counter(found) == Counter(values)


def test_spans_count_bos():
    document = next(generate(RetrievalSpec(16, 16, 2, 0.5, 0), 0, 1))
    [encoded] = encode_documents([document], bpe)
    [span] = encoded.answers
    assert isinstance(span, AnswerSpan)
    assert encoded.ids[0] == bpe.bos_id and encoded.ids[-1] == bpe.eos_id
    assert bpe.decode(encoded.ids[1:-1]) == document.text
    before = "".join(document.pieces[: document.answers[0].piece])
    assert encoded.ids[1 : span.start] == bpe.encode(before)


def test_documents_in_many_batches_keep_their_order():
    documents = [Document((f"Number {i}.",)) for i in range(700)]
    texts = [bpe.decode(encoded.ids[1:-1]) for encoded in encode_documents(documents, bpe)]
    assert texts == [document.text for document in documents]


def _source(**splits):
    return Source("text", lambda s: iter([Document((t,)) for t in splits.get(s, [])]), False)


def test_a_single_long_document_is_split_by_blocks_from_its_end():
    text = " ".join(map(str, range(400)))
    packs, split_by = pack_source(_source(train=[text]), bpe, block_len=20, holdout=0.1)
    assert split_by == "block"
    stream = [bpe.bos_id, *bpe.encode(text), bpe.eos_id]
    num_blocks = len(stream) // 20
    assert [len(packs[s].tokens) for s in ("validation", "test")] == [num_blocks // 10] * 2
    joined = np.concatenate([packs[s].tokens for s in ("train", "validation", "test")])
    assert joined.ravel().tolist() == stream[: num_blocks * 20]
    assert sum(packed.num_dropped for packed in packs.values()) == len(stream) - num_blocks * 20


def test_splits_of_enough_text_are_packed_by_themselves():
    source = _source(train=["a b c d e f g"], validation=["h i j k"], test=["l m n o p"])
    packs, split_by = pack_source(source, bpe, block_len=5, holdout=0.1)
    assert split_by == "document"
    assert bpe.decode(packs["validation"].tokens[0]).startswith("<bos>h")


def test_too_little_text_is_named_with_tokens_and_block_length():
    num_tokens = len(bpe.encode("it")) + 2
    sentence = rf"has {num_tokens} tokens, .* one block of 20 \(seq_len \+ 1\)"
    with pytest.raises(DataError, match=sentence):
        pack_source(_source(train=["it"]), bpe, block_len=20, holdout=0.1)


def test_the_smallest_type_holds_every_id():
    assert [smallest_dtype(n) for n in (255, 256, 32_000, 65_536)] == [
        np.uint8,
        np.uint16,
        np.uint16,
        np.uint32,
    ]
