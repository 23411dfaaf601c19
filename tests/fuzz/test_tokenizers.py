"""Tokenizer files of every kind, damaged: one that opens encodes and decodes, others are refused in a sentence."""

import base64
import json
import pathlib
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import altered, damaged, refused_in_a_sentence, settings
from meap_jax import tokenizers
from meap_jax.errors import ConfigError
from tokenizer_kinds import byte_level, llama, sentencepiece_model, unigram

BPE = tokenizers.train_bpe(["some text, and some more text"] * 9, 280).files()["tokenizer.json"]
TEKKEN = {
    "config": {"pattern": r"\w+|\s+|.", "default_vocab_size": 300, "default_num_special_tokens": 44, "version": "v3"},
    "vocab": [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)],
    "special_tokens": [{"rank": i, "token_str": name} for i, name in enumerate(("<unk>", "<s>", "</s>", "<pad>"))],
}
CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": [{"name": "default", "template": "x"}]}
WHOLE = {
    "bpe": ("tokenizer.json", lambda: BPE),
    "byte_level": ("tokenizer.json", lambda: byte_level().encode()),
    "llama": ("tokenizer.json", lambda: llama(True).encode()),
    "unigram": ("tokenizer.json", lambda: unigram().encode()),
    "sentencepiece": ("tokenizer.model", lambda: sentencepiece_model()),
    "tekken": ("tekken.json", lambda: json.dumps(TEKKEN).encode()),
}


def use(files):
    """Opens the tokenizer of files, and uses it."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            pathlib.Path(folder, name).write_bytes(data)
        tokenizer = tokenizers.make(folder)
        ids = tokenizer.encode("some text é 😀 <s>")
        assert all(0 <= index < tokenizer.num_tokens for index in ids)
        tokenizer.decode(ids)
        return tokenizer


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_one_opens(kind):
    name, whole = WHOLE[kind]
    use({name: whole()})


@pytest.mark.parametrize("kind", WHOLE)
@settings
@given(st.data())
def test_a_damaged_one_is_used_or_refused(kind, data):
    name, whole = WHOLE[kind]
    with refused_in_a_sentence():
        use({name: data.draw(damaged(whole()))})


@pytest.mark.parametrize("kind", [kind for kind in WHOLE if kind != "sentencepiece"])
@settings
@given(st.data())
def test_one_in_which_a_value_is_another_is_used_or_refused(kind, data):
    name, whole = WHOLE[kind]
    with refused_in_a_sentence():
        use({name: json.dumps(data.draw(altered(json.loads(whole())))).encode()})


@settings
@given(altered(CONFIG).map(lambda content: json.dumps(content).encode()) | damaged(json.dumps(CONFIG).encode()))
def test_a_config_beside_it_of_any_form_is_used_or_refused(config):
    with refused_in_a_sentence():
        use({"tokenizer.json": llama(True).encode(), "tokenizer_config.json": config})


@pytest.mark.parametrize(
    "head", [b"{" * 100_000, b'{"model": ' + b"[" * 100_000, b"\0" * 1_000, b"[1]", b"{}", b"\xff{"]
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tekken.json"])
def test_what_is_none_is_refused(head, name):
    with pytest.raises(ConfigError, match=name):
        use({name: head})
