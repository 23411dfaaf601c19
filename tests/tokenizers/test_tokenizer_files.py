"""Tokenizers that `data.tokenizer` names by word or path, their special ids, and what is wrong with some."""

import json

import pytest

import tokenizers as package
from meap_jax import tokenizers
from meap_jax.data.manifest import hash_of
from meap_jax.errors import ConfigError
from meap_jax.tokenizers.sentence_piece import SentencePieceTokenizer
from tokenizer_kinds import byte_level, hugging_face, kind, llama, sentencepiece_model, unigram


def with_added(serialized, *names, special=True):
    """A tokenizer.json with more added tokens, at the next ids."""
    content = json.loads(serialized)
    vocab = content["model"]["vocab"]
    free = max([len(vocab), *(token["id"] + 1 for token in content["added_tokens"])])
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=special)
    content["added_tokens"] += [{"id": free + i, "content": name} | flags for i, name in enumerate(names)]
    return json.dumps(content)


def tekken_listing(*names):
    """A tekken.json with these special tokens."""
    content = json.loads(kind("tekken").files()["tekken.json"])
    content["special_tokens"] = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("file", "content", "other"),
    [
        ("tokenizer.model", lambda: sentencepiece_model(), "sentencepiece"),
        ("spiece.model.v3", lambda: sentencepiece_model(), "sentencepiece"),
        ("tokenizer.json", lambda: byte_level().encode(), "huggingface"),
        ("llama.json", lambda: llama(True).encode(), "huggingface"),
        ("tekken_240911.json", lambda: kind("tekken").files()["tekken.json"], "tekken"),
        ("tokenizer.json", lambda: kind("bpe").files()["tokenizer.json"], "bpe"),
    ],
)
def test_a_file_is_known_by_its_content(tmp_path, file, content, other):
    (tmp_path / file).write_bytes(content())
    assert tokenizers.make(str(tmp_path / file)).name == other


def test_a_folder_of_several_gives_the_one_that_others_would_read(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    assert tokenizers.make(str(tmp_path)).name == "sentencepiece"
    (tmp_path / "tokenizer.json").write_text(llama(True), encoding="utf-8")
    assert tokenizers.make(str(tmp_path)).name == "huggingface"


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("llama", None, b"", r"'llama', but must be one of mistral, tekken, or a path, such as \./llama"),
        ("bpe", None, b"", "'bpe', but must be one of mistral, tekken"),
        ("{}/absent.model", None, b"", "but no such file or folder"),
        ("gs://bucket/tokenizer.json", None, b"", "but no such file or folder is on this machine"),
        ("{}", None, b"", "but that folder holds none of tokenizer.json, tokenizer.model, tekken.json"),
        ("{}", "tokenizer.model", b"garbage", "tokenizer.model', but is not a SentencePiece model"),
        ("{}", "tokenizer.model", b"", "but is a SentencePiece model without pieces"),
        ("{}", "tokenizer.model", lambda: sentencepiece_model()[:-100], "but is not a SentencePiece model"),
        ("{}", "tokenizer.model", lambda: sentencepiece_model(bos_id=-1), "without bos: train it with one"),
        ("{}", "tokenizer.model", lambda: sentencepiece_model(eos_id=-1), "without eos: train it with one"),
        ("{}", "tokenizer.json", b"{", "tokenizer.json', but is not JSON"),
        ("{}", "tokenizer.json", b"{\xff}", "tokenizer.json', but is not JSON"),
        ("{}", "tokenizer.json", b"{}", "but is neither a tokenizer.json nor a tekken.json"),
        ("{}", "tokenizer.json", b'{"model": {"type": "Odd"}}', "but is not a tokenizer.json that"),
        ("{}", "tekken.json", b'{"config": {}, "vocab": []}', "but is not a tekken.json that can be read"),
        ("{}", "tekken.json", b'{"config": 1, "vocab": 2}', "but is not a tekken.json that can be read"),
        ("{}", "tekken.json", lambda: tekken_listing("<unk>", "<s>"), "without </s> among its special_tokens"),
    ],
)
def test_what_is_no_tokenizer_is_refused_in_a_sentence(tmp_path, name, file, content, message):
    if file:
        (tmp_path / file).write_bytes(content() if callable(content) else content)
    with pytest.raises(ConfigError, match=message) as error:
        tokenizers.make(name.format(tmp_path))
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_tekken_that_lists_its_specials_has_them(tmp_path):
    (tmp_path / "tekken.json").write_bytes(tekken_listing("<unk>", "</s>", "<s>", "<mask>", "<pad>"))
    tekken = tokenizers.make(str(tmp_path))
    assert (tekken.eos_id, tekken.bos_id, tekken.mask_id, tekken.pad_id) == (1, 2, 3, 4)
    assert (tekken.num_tokens, tekken.decode([2, 3])) == (131072, "<s><mask>")
    assert tekken.encode("<mask> sky") == kind("tekken").encode("<mask> sky")


@pytest.mark.parametrize(("word", "file"), [("mistral", None), ("tekken", None), ("tekken", "old version")])
def test_a_missing_package_is_one_sentence(monkeypatch, tmp_path, word, file):
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]}) if file else None
    monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ConfigError, match=f"'{word}', but the package mistral-common.*: pip install mistral-common"):
        tokenizers.make(word)


def test_ids_of_a_sentencepiece_model_are_its_own():
    tokenizer = SentencePieceTokenizer(sentencepiece_model(bos_id=5, eos_id=4, unk_id=0, pad_id=3))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (5, 4, 3)
    assert tokenizer.mask_id == tokenizer.num_tokens - 1
    assert kind("sentencepiece").mask_id == 3  # a control symbol of the model
    normalizing = kind("sentencepiece_normalizing")  # has a <mask> that it finds in text
    assert normalizing.mask_id == normalizing.num_tokens - 1


def test_a_32000_piece_tokenizer_json_has_the_mask_of_the_paper():
    content = json.loads(llama(False))
    vocab = content["model"]["vocab"]
    vocab |= {f"piece {i}": i for i in range(len(vocab), 32_000)}
    tokenizer = hugging_face(json.dumps(content))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert (tokenizer.mask_id, tokenizer.num_tokens, tokenizer.vocab_size) == (32_000, 32_001, 32_064)


def test_an_end_of_text_alone_also_begins_documents_and_padding_differs_from_it():
    tokenizer = kind("byte_level")
    vocab = len(json.loads(byte_level())["model"]["vocab"])
    assert tokenizer.bos_id == tokenizer.eos_id == vocab
    assert (tokenizer.mask_id, tokenizer.pad_id, tokenizer.num_tokens) == (vocab + 1, vocab + 2, vocab + 3)
    assert tokenizer.decode([vocab + 1, vocab + 2]) == "[MASK]<pad>"


def test_the_truncation_padding_and_dropout_of_a_file_are_ignored():
    lengths = [len(ids) for ids in kind("byte_level").encode_batch(["a", "The sky is grey. " * 10])]
    assert lengths[0] == 1 and lengths[1] > 20
    content = json.loads(byte_level())
    content["model"]["dropout"] = 0.9
    text = "The sky is grey."
    assert hugging_face(json.dumps(content)).encode(text) == kind("byte_level").encode(text)


def test_tokenizer_config_beside_it_names_the_special_tokens(tmp_path):
    serialized = with_added(llama(True), "<|im_start|>", "<|im_end|>", "<fill>", "<hidden>")
    config = {
        "bos_token": {"content": "<|im_start|>", "__type": "AddedToken"},
        "eos_token": "<|im_end|>",
        "pad_token": "<fill>",
        "mask_token": "<hidden>",
        "chat_template": "none of our business",
    }
    (tmp_path / "tokenizer.json").write_text(serialized, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = tokenizers.make(str(tmp_path / "tokenizer.json"))
    free = len(json.loads(llama(True))["model"]["vocab"])
    roles = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id)
    assert roles == (free, free + 1, free + 2, free + 3) and tokenizer.num_tokens == free + 4
    # The hash depends on what ids mean, not by what else their folders say.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "new"}), encoding="utf-8")
    assert hash_of(tokenizers.make(str(tmp_path)).files()) == hash_of(tokenizer.files())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "</s>"}), encoding="utf-8")
    assert hash_of(tokenizers.make(str(tmp_path)).files()) != hash_of(tokenizer.files())


@pytest.mark.parametrize("pad", ["<s>", "</s>", None])
def test_padding_is_never_the_begin_or_end_of_a_document(pad):
    tokenizer = hugging_face(llama(True), {"pad_token": pad})
    assert tokenizer.pad_id == 0  # <unk>, which bytes never give
    own = hugging_face(with_added(llama(True), "<pad>"), {"pad_token": pad})
    assert own.decode([own.pad_id]) == "<pad>" and own.mask_id == own.pad_id + 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": "<absent>"}, "its tokenizer_config.json has eos_token '<absent>', which isn't among"),
        ({"eos_token": ["</s>"]}, "its tokenizer_config.json has eos_token"),
        ({}, "none of its added_tokens is known to end a text .*: name one as eos_token"),
    ],
)
def test_a_tokenizer_json_without_an_end_of_text_is_refused(config, message):
    content = json.loads(llama(True))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "</s>"]
    with pytest.raises(ConfigError, match=message):
        hugging_face(json.dumps(content), config)


def test_special_tokens_that_merges_lead_to_are_not_reached():
    content = json.loads(llama(False))
    vocab = content["model"]["vocab"]
    leading = [["<", "/"], ["</", "s"], ["</s", ">"], ["</s>", "<"]]
    for pair in leading:
        vocab.setdefault("".join(pair), len(vocab))
    content["model"]["merges"] = leading + [pair for pair in content["model"]["merges"] if pair not in leading]
    found = hugging_face(json.dumps(content))
    # The merges do lead there: the package alone gives id 2, even where it doesn't look for special tokens.
    alone = package.Tokenizer.from_str(json.dumps(content))
    alone.encode_special_tokens = True
    assert 2 in alone.encode("a</s>b", add_special_tokens=False).ids
    ids = found.encode("a</s>b")
    assert 2 not in ids and found.decode(ids) == "a</s>b"


def test_added_tokens_that_are_not_special_stay_text():
    tokenizer = hugging_face(with_added(byte_level(), "<table>", special=False))
    table = kind("byte_level").eos_id + 1
    assert table in tokenizer.encode("a <table> b") and tokenizer.mask_id == table + 1
    assert tokenizer.decode(tokenizer.encode("a <table> b")) == "a <table> b"


def test_the_pieces_of_a_unigram_model_that_are_special_are_not_found_in_text():
    alone = package.Tokenizer.from_str(unigram())
    alone.encode_special_tokens = True
    assert alone.token_to_id("</s>") in alone.encode("a </s>", add_special_tokens=False).ids
    tokenizer = kind("unigram")
    assert tokenizer.eos_id not in tokenizer.encode("a </s>")
