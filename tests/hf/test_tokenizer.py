"""Tokenizers of every kind as transformers' files: the same ids, [MASK] in its place, and opened again as they were."""

import json

import pytest

from hub_folders import write_tokenizer
from meap_jax.errors import ConfigError
from meap_jax.hf.tokenizer import hub_files, merges, open_hub_tokenizer
from meap_jax.tokenizers import load
from tokenizer_kinds import CORPUS, EXACT, hugging_face, kind
from tokenizers import Tokenizer

TEXTS = [*CORPUS[::40], "ein Über-Text, 日本 🙂🚀\n\n  x = 1\tHello world", " leading and  double", "", "a" * 300]


@pytest.mark.parametrize("name", [name for name in EXACT if name != "llama_metaspace"])
def test_texts_have_the_same_ids_and_mask_is_found_where_it_stands(name, tmp_path):
    tokenizer = kind(name)
    for file, content in hub_files(tokenizer, 128).items():
        (tmp_path / file).write_bytes(content)
    there = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    texts = [text for text in TEXTS if not any(special in text for special in ("<", "[MASK]"))]
    found = [there.encode(text, add_special_tokens=False).ids for text in texts]
    assert found == tokenizer.encode_batch(texts)
    assert there.token_to_id(config["mask_token"]) == tokenizer.mask_id
    assert tokenizer.mask_id in there.encode(f"The sky {config['mask_token']}").ids
    for text, ids in zip(texts, found, strict=True):
        assert there.decode(ids) == text or name == "unigram"
    again, adds_bos = open_hub_tokenizer(tmp_path)
    roles = ("bos_id", "eos_id", "mask_id")
    assert [getattr(again, role) for role in roles] == [getattr(tokenizer, role) for role in roles]
    assert again.encode_batch(texts) == found and load(tmp_path).mask_id == tokenizer.mask_id
    assert adds_bos == (name in ("bpe", "mistral", "tekken", "sentencepiece"))


def test_a_tokenizer_whose_ids_leave_places_out_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 700, "content": "<|far|>"})
    content["model"]["vocab"]["<|far|>"] = 700
    tokenizer = hugging_face(json.dumps(content))
    with pytest.raises(ConfigError, match="would not be id 701 there"):
        hub_files(tokenizer, 128)


def test_a_tokenizer_that_would_give_other_ids_is_refused():
    with pytest.raises(ConfigError, match="can't be written for transformers"):
        hub_files(kind("sentencepiece_normalizing"), 128)


def test_merges_of_a_vocabulary_come_in_the_order_of_preference():
    assert merges({"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}) == [
        ("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c"),
    ]  # fmt: skip
