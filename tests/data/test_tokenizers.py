"""The small BPE and the 32,000-piece model."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meap_jax.config import ConfigError
from meap_jax.data import tokenizers
from meap_jax.data.retrieval import RetrievalSpec, generate

SPECIALS = ("<pad>", "<bos>", "<eos>", "[MASK]", "<s>", "</s>", "<unk>")
TEXTS = [document.text for document in generate(RetrievalSpec(16, 16, 4, 1, 3), 0, 300)]

bpe = tokenizers.train_bpe([*TEXTS, *SPECIALS * 50], 600)
mistral = tokenizers.mistral()
both = pytest.mark.parametrize("tokenizer", [bpe, mistral], ids=lambda t: t.name)
# Any text, and texts full of what must not be taken for a special token.
texts = st.text() | st.lists(st.sampled_from([*SPECIALS, " ", "a", "\n"])).map("".join)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_bpe_gives_every_text_back(text):
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.encode_batch([text, text]) == [bpe.encode(text)] * 2


@settings(max_examples=200, deadline=None)
@given(texts.filter(lambda text: "\u2581" not in text))
def test_mistral_gives_every_text_back(text):
    assert mistral.decode(mistral.encode(text)) == text
    assert mistral.encode_batch([text, text]) == [mistral.encode(text)] * 2


@both
@settings(max_examples=50, deadline=None)
@given(text=texts)
def test_no_text_becomes_a_special_id(tokenizer, text):
    ids = tokenizer.encode(text + "".join(SPECIALS)) + tokenizer.encode(text, continues=True)
    special = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id}
    assert len(special) == 4 and not special & set(ids)
    assert all(0 <= i < tokenizer.num_tokens for i in ids)


@both
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000))
def test_pieces_of_a_retrieval_document_read_like_its_whole_text(tokenizer, seed):
    [document] = generate(RetrievalSpec(60, 60, 6, 0.7, 3), seed, 1)
    first, *rest = document.pieces
    pieces = [tokenizer.encode(first), *tokenizer.encode_batch(rest, continues=True)]
    assert sum(pieces, []) == tokenizer.encode(document.text)
    answer = document.answers[0]
    question = pieces[answer.piece - 1]
    assert tokenizer.decode(question + pieces[answer.piece]) == (
        tokenizer.decode(question) + document.pieces[answer.piece]
    )


@both
def test_the_frozen_files_give_the_same_tokenizer(tokenizer, tmp_path):
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    loaded = tokenizers.load(tmp_path)
    assert type(loaded) is type(tokenizer) and loaded.files() == tokenizer.files()
    text = TEXTS[0] + "".join(SPECIALS) + "ünï"
    assert loaded.encode(text) == tokenizer.encode(text)
    for name in ("vocab_size", "num_tokens", "pad_id", "bos_id", "eos_id", "mask_id", "name"):
        assert getattr(loaded, name) == getattr(tokenizer, name)


@both
def test_specials_are_visible_when_decoded(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("The sky"), tokenizer.mask_id]
    ids += [*tokenizer.encode(" grey", continues=True), tokenizer.eos_id]
    bos, eos = {"bpe": ("<bos>", "<eos>"), "sentencepiece": ("<s>", "</s>")}[tokenizer.name]
    assert tokenizer.decode(ids) == f"{bos}The sky[MASK] grey{eos}"
    assert tokenizer.decode(np.array(ids, np.uint16)) == tokenizer.decode(ids)
    assert tokenizer.decode([]) == ""


def test_mistral_has_the_ids_of_the_paper():
    # Section 4.1 of the paper and the official code: [MASK] = 32000, vocabulary padded to 32064.
    assert (mistral.bos_id, mistral.eos_id, mistral.mask_id) == (1, 2, 32000)
    assert (mistral.num_tokens, mistral.vocab_size) == (32001, 32064)
    assert "mistral_common" not in sys.modules


def test_training_twice_gives_the_same_bpe():
    assert tokenizers.train_bpe([*TEXTS, *SPECIALS * 50], 600).files() == bpe.files()


def test_bpe_stays_within_its_size_and_pads_it_to_a_multiple_of_64():
    assert bpe.num_tokens <= 600 and bpe.vocab_size % 64 == 0
    assert bpe.num_tokens <= bpe.vocab_size < bpe.num_tokens + 64
    assert tokenizers.train_bpe([], 300).num_tokens == 260


def test_words_of_retrieval_become_single_tokens():
    assert [len(bpe.encode(f" {word}")) for word in ("harbor", "museum", "falcon", "otter")] == [1] * 4


def test_a_bpe_too_small_for_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="100: a byte-level BPE needs at least 260"):
        tokenizers.train_bpe(TEXTS, 100)


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install mistral-common"):
        tokenizers.mistral()
