"""What every kind of tokenizer promises."""

import json
import re
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meap_jax import tokenizers
from meap_jax.corpus.documents import Document, Span, token_spans
from meap_jax.data.manifest import hash_of
from meap_jax.errors import ConfigError
from meap_jax.tokenizers import interface
from tiny_runs import PEAK
from tokenizer_kinds import CORPUS, EXACT, KINDS, SPECIALS, TEXTS, kind

every_kind = pytest.mark.parametrize("name", KINDS)
exact_kinds = pytest.mark.parametrize("name", EXACT)
# Any text, and texts full of what must not be taken for a special token. U+2581 is SentencePiece's own space.
WORDS = (*SPECIALS, " ", "  ", "a", "\n", "\r\n", "\0", "😀", "中", "\u2581")
texts = st.text() | st.lists(st.sampled_from(WORDS)).map("".join)
ODD = [
    "", " ", "\0\x01\x7f\x85", "a\r\nb\r c\n\n\n d", "👩‍👩‍👧 🇨🇭", "中文和日本語かな",
    " \t x  y ", "e\u0301\ufffd", "\ufeffa\u200b\u2028",
]  # fmt: skip


def opened(name, text):
    """A text that a kind gives back: those that spell spaces U+2581 take it for one, newer Llamas a space in front."""
    text = text if name in ("bpe", "tekken", "byte_level") else text.replace("\u2581", "_")
    return text.lstrip(" ") if name == "llama_metaspace" else text


def check_offsets(offsets, ids, text):
    """What holds for every kind: a range of characters a token, in order, none empty."""
    assert offsets.shape == (len(ids), 2) and offsets.dtype == np.int64
    assert (np.diff(offsets, axis=0) >= 0).all() and (offsets[:, 0] < offsets[:, 1]).all()
    assert not len(ids) or 0 <= offsets[0, 0] and offsets[-1, 1] <= len(text)


@exact_kinds
@settings(max_examples=100, deadline=None)
@given(text=texts, data=st.data())
@example(text="", data=None)
@example(text="👩‍👩‍👧 🇨🇭 e\u0301\ufffd", data=None)
def test_every_text_comes_back_and_its_offsets_cover_it(name, text, data):
    tokenizer = kind(name)
    text = opened(name, text)
    [(ids, offsets), again] = tokenizer.encode_with_offsets([text, text])
    assert ids == again[0] == tokenizer.encode(text) and tokenizer.decode(ids) == text
    check_offsets(offsets, ids, text)
    if not text:
        return
    assert offsets[0, 0] == 0 and offsets[-1, 1] == len(text) and (offsets[1:, 0] <= offsets[:-1, 1]).all()
    start = data.draw(st.integers(0, len(text) - 1)) if data else 0
    stop = data.draw(st.integers(start + 1, len(text))) if data else len(text)
    [span] = token_spans(Document(text, (Span(start, stop, "answer"),)), offsets)
    inside = [i for i, (begin, end) in enumerate(offsets) if begin < stop and end > start]
    assert list(range(span.start - 1, span.start - 1 + span.length)) == inside  # Behind bos.
    first, last = inside[0], inside[-1] + 1
    mask = tokenizer.decode([tokenizer.mask_id])
    shares_character = (offsets[last:, 0] < offsets[last - 1, 1]).any()
    if first and not shares_character and mask not in text:  # A document would open behind a mask in front of it.
        marked = [*ids[:first], tokenizer.mask_id, *ids[first:last], tokenizer.mask_id, *ids[last:]]
        found = tokenizer.decode(marked).split(mask)
        assert "".join(found) == text and text[start:stop] in found[1]


def test_lone_surrogates_become_replacement_characters_and_pairs_become_one_character():
    assert interface.clean("sky\ud800 \udcffgrey\ud83d\ude00") == "sky\ufffd \ufffdgrey😀"


@every_kind
@settings(max_examples=50, deadline=None)
@given(text=texts | st.text(st.characters(min_codepoint=0xD700, max_codepoint=0xE000)))
@example(text="a\ud83d\ude00 \ud800b")
def test_offsets_are_those_of_the_text_as_it_was_given(name, text):
    [(ids, offsets), (clean_ids, clean_offsets)] = kind(name).encode_with_offsets([text, interface.clean(text)])
    check_offsets(offsets, ids, text)
    assert ids == clean_ids == kind(name).encode(text)
    for given_at, clean_at in zip(offsets, clean_offsets, strict=True):
        assert interface.clean(text[slice(*given_at)]) == interface.clean(text)[slice(*clean_at)]


@every_kind
@settings(max_examples=50, deadline=None)
@given(text=texts)
def test_no_text_becomes_a_special_id(name, text):
    tokenizer = kind(name)
    ids = tokenizer.encode(text + "".join(SPECIALS) + text)
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id} & set(ids)
    assert name not in EXACT or tokenizer.pad_id not in ids
    assert all(0 <= i < tokenizer.num_tokens for i in ids)


@every_kind
def test_each_role_has_an_id_of_its_own(name):
    tokenizer = kind(name)
    roles = [tokenizer.pad_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.bos_id]
    assert len(set(roles)) == (3 if name == "byte_level" else 4)
    assert 0 <= min(roles) and max(roles) < tokenizer.num_tokens <= tokenizer.vocab_size < tokenizer.num_tokens + 64
    assert tokenizer.vocab_size % 64 == 0


@every_kind
def test_the_frozen_files_give_the_same_tokenizer(name, tmp_path):
    tokenizer = kind(name)
    for file, content in tokenizer.files().items():
        (tmp_path / file).write_bytes(content)
    text = TEXTS[0] + "".join(SPECIALS) + "ünï"
    for loaded in (tokenizers.load(tmp_path), tokenizers.make(str(tmp_path))):
        assert type(loaded) is type(tokenizer) and loaded.files() == tokenizer.files()
        assert hash_of(loaded.files()) == hash_of(tokenizer.files())
        assert loaded.encode(text) == tokenizer.encode(text)
        for field in ("vocab_size", "num_tokens", "pad_id", "bos_id", "eos_id", "mask_id", "name"):
            assert getattr(loaded, field) == getattr(tokenizer, field)


def test_fingerprints_differ_between_tokenizers():
    assert len({hash_of(kind(name).files()) for name in KINDS}) == len(KINDS)


@every_kind
def test_specials_are_visible_when_decoded(name):
    tokenizer = kind(name)
    sky = tokenizer.encode("The sky")
    ids = [tokenizer.bos_id, *sky, tokenizer.mask_id, *tokenizer.encode("The sky grey")[len(sky) :], tokenizer.eos_id]
    bos, eos = {"bpe": ("<bos>", "<eos>"), "byte_level": ("<|endoftext|>",) * 2}.get(name, ("<s>", "</s>"))
    mask = "<mask>" if name == "unigram" else "[MASK]"
    assert tokenizer.decode(ids) == f"{bos}The sky{mask} grey{eos}"
    assert tokenizer.decode(np.array(ids, np.uint32)) == tokenizer.decode(ids)
    assert tokenizer.decode([]) == ""
    row = tokenizer.vocab_size - 1  # One that pads the vocabulary, of most kinds.
    assert row < tokenizer.num_tokens or tokenizer.decode([row]) == f"<{row}>"


@every_kind
@settings(max_examples=20, deadline=None)
@given(text=st.text("ab .\n中é😀", min_size=30, max_size=200), size=st.integers(15, 30))
def test_a_long_text_has_the_ids_and_offsets_that_it_has_uncut(name, text, size):
    tokenizer = kind(name)
    uncut = tokenizer.encode_with_offsets([text, "a", text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interface, "MAX_CHUNK", size)
        patch.setattr(interface, "_MAX_BATCH", 2 * size)
        bounds = list(interface.cut(text, anywhere=not tokenizer._anchor[0]))
        found = tokenizer.encode_with_offsets([text, "a", text])
        assert tokenizer.encode_batch([text, "a"]) == [found[0][0], found[1][0]]
    assert bounds[0] == 0 and bounds[-1] == len(text)
    for start, stop in pairwise(bounds):
        is_longer_than_it_must_be = re.search("(?<=[^\\W_]) (?=[^\\W_])", text[start + 1 : stop - 1])
        assert 0 < stop - start <= size or not (tokenizer._anchor[0] == "" or is_longer_than_it_must_be)
    if all(text[i - 1].isalnum() and text[i] == " " and text[i + 1].isalnum() for i in bounds[1:-1]):
        for (ids, offsets), (uncut_ids, uncut_offsets) in zip(found, uncut, strict=True):
            assert ids == uncut_ids
            np.testing.assert_array_equal(offsets, uncut_offsets)
    else:
        assert name in ("bpe", "tekken", "byte_level") and tokenizer.decode(found[0][0]) == text
        check_offsets(found[0][1], found[0][0], text)
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("name", ["mistral", "tekken", "byte_level", "llama"])
@pytest.mark.parametrize("unit", ["a", " ", "\t ", "中"])
def test_a_million_equal_characters_take_seconds_at_most(name, unit):
    text = "x" + unit * (1_000_000 // len(unit))
    start = time.monotonic()
    ids = kind(name).encode(text)
    assert time.monotonic() - start < 20
    assert kind(name).decode(ids) == text


_MEASURED = f"""
import sys
{PEAK}
from meap_jax import tokenizers
tokenizer = tokenizers.load(sys.argv[1])
text = open(sys.argv[2], encoding="utf-8").read()
tokenizer.encode(text[:100_000])
before = peak()
ids = tokenizer.encode(text)
after = peak()
assert tokenizer.decode(ids) == text
print((after - before) / len(ids))
"""


@pytest.mark.parametrize("name", ["mistral", "tekken", "llama"])
def test_a_document_of_ten_megabytes_takes_little_more_memory_than_its_ids(name, tmp_path):
    text = "\n".join(TEXTS)
    text = (text * (10_000_000 // len(text) + 1))[:10_000_000]
    (tmp_path / "text").write_text(text, encoding="utf-8")
    for file, content in kind(name).files().items():
        (tmp_path / file).write_bytes(content)
    command = [sys.executable, "-c", _MEASURED, str(tmp_path), str(tmp_path / "text")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    # A Python list takes 8 bytes an id, and an id above 256 is an object of 28 to 32.
    assert float(done.stdout) < 80


@pytest.mark.parametrize(
    ("name", "ids"),
    # Section 4.1 of the paper and the official code: [MASK] = 32000, vocabulary padded to 32064.
    [("mistral", (0, 1, 2, 32_000, 32_001, 32_064)), ("tekken", (11, 1, 2, 131_072, 131_073, 131_136))],
)
def test_carried_tokenizers_have_the_ids_of_the_paper_and_need_no_import_of_what_carries_them(name, ids):
    t = kind(name)
    assert (t.pad_id, t.bos_id, t.eos_id, t.mask_id, t.num_tokens, t.vocab_size) == ids
    assert "mistral_common" not in sys.modules


_REFERENCE = """
import importlib.resources, json, sys
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
file = sorted((importlib.resources.files("mistral_common") / "data").glob("tekken_*.json"))[0]
tekken = Tekkenizer.from_file(file)
print(json.dumps([tekken.encode(text, bos=True, eos=True) for text in json.load(sys.stdin)]))
"""


def test_tekken_gives_the_ids_that_mistral_gives():
    given = [*TEXTS[:20], *ODD, "".join(SPECIALS)]
    command = [sys.executable, "-c", _REFERENCE]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, check=True, timeout=100)
    assert [[1, *ids, 2] for ids in kind("tekken").encode_batch(given)] == json.loads(done.stdout)


def test_training_twice_gives_the_same_bpe_within_its_size():
    assert tokenizers.train_bpe(CORPUS, 600).files() == kind("bpe").files()
    assert kind("bpe").num_tokens <= 600 and tokenizers.train_bpe([], 300).num_tokens == 260


def test_words_of_retrieval_become_single_tokens():
    assert [len(kind("bpe").encode(f" {word}")) for word in ("harbor", "museum", "falcon", "otter")] == [1] * 4


def test_a_bpe_too_small_for_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="100: a byte-level BPE needs at least 260"):
        tokenizers.train_bpe(TEXTS, 100)
