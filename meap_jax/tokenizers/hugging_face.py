"""Any `tokenizer.json` of the Hugging Face hub, by the `tokenizers` package."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

import tokenizers
from meap_jax.tokenizers.interface import GUARD, SECRET, Encoded, Tokenizer, refusal

# Roles that no tokenizer_config.json beside it names are looked for among the added tokens, the first name first.
_NAMES = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>", "[BOS]", "[CLS]"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "[EOS]", "[SEP]"),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<｜▁pad▁｜>", "<|finetune_right_pad_id|>"),
    "mask_token": ("[MASK]", "<mask>", "<|mask|>"),
}
_UNKNOWN_NAMES = ("<unk>", "[UNK]")


class PackageTokenizer(Tokenizer):
    """What encodes and decodes by the package `tokenizers`."""

    _tokenizer: tokenizers.Tokenizer

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_with_offsets(self, texts: list[str]) -> list[Encoded]:
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(found.ids, np.array(found.offsets, np.int64).reshape(-1, 2)) for found in encodings]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class HuggingFaceTokenizer(PackageTokenizer):
    """A tokenizer.json with its own ids, plus [MASK] at the next free id unless it has a mask token.

    The begin and end of documents are what its tokenizer_config.json says, else added tokens with usual names; a
    tokenizer with an end alone, as GPT-2's, begins documents with it too. Padding is its own token for it, else its
    unknown token, else one more free id; never bos or eos, though many a tokenizer_config.json says so.

    `decode(encode(text)) == text` for byte-level BPE without a normalizer, and, but for texts with U+2581, for BPE
    with byte fallback as Llama's; of newer files of that kind (Metaspace) a text loses one space at its very beginning.
    Truncation and padding that the file asks for are turned off.
    """

    name = "huggingface"

    def __init__(self, serialized: str, config: Mapping[str, Any], where: str = "tokenizer.json"):
        """Rebuilds a tokenizer from its JSON.

        Args:
          serialized: the content of a tokenizer.json.
          config: of the tokenizer_config.json beside it; empty if there is none.
          where: the path, for the errors.

        Raises:
          ConfigError: it is no such file, or one in which no end of text is to be found.
        """
        self._serialized = serialized
        try:
            content = json.loads(tokenizers.Tokenizer.from_str(serialized).to_str())  # in its newest spelling
        except Exception as error:  # the package raises nothing narrower
            raise refusal(where, f"is not a tokenizer.json that the package tokenizers can read ({error})") from error
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        self._names = _resolve(config, added, where)
        self.chat_template = _chat_template(config)
        roles = {role: added[name] for role, name in self._names.items()}
        self.bos_id, self.eos_id = roles["bos_token"], roles["eos_token"]
        free = self.num_own_ids = 1 + max([*added.values(), *_vocab(content["model"]).values()])
        self.mask_id = roles.get("mask_token", free)
        free = max(free, self.mask_id + 1)
        unknown = _unknown(content["model"], added)
        self.pad_id = roles.get("pad_token", unknown)
        if self.pad_id in (-1, self.bos_id, self.eos_id, self.mask_id):
            self.pad_id = free
        self.num_tokens = max(free, self.pad_id + 1)

        for token in content["added_tokens"]:
            token["special"] |= token["id"] in (self.bos_id, self.eos_id, self.mask_id, self.pad_id)
        self._specials = {token["id"]: token["content"] for token in content["added_tokens"] if token["special"]}
        self._specials.setdefault(self.mask_id, "[MASK]")
        self._specials.setdefault(self.pad_id, "<pad>")
        _hide_specials(content)
        self._tokenizer = _build(content)

    def files(self) -> dict[str, bytes]:
        """The tokenizer.json as it was, and a tokenizer_config.json of the special tokens' names alone."""
        config = json.dumps(self._names, ensure_ascii=False, indent=2, sort_keys=True)
        return {"tokenizer.json": self._serialized.encode("utf-8"), "tokenizer_config.json": config.encode("utf-8")}

    def _encode_rendered(self, text: str) -> list[int]:
        """As transformers encodes it: its special tokens may take the blanks beside them."""
        secret = self.special_names.sub(lambda found: _secret(self._special_ids[found[0]]), text).replace(GUARD, "")
        return self._finding_specials.encode(secret, add_special_tokens=False).ids

    @functools.cached_property
    def _finding_specials(self) -> tokenizers.Tokenizer:
        """The tokenizer that finds special tokens in text, by their secret names."""
        finding = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        finding.encode_special_tokens = False
        return finding


def _chat_template(config: Mapping[str, Any]) -> str:
    """The chat template of a tokenizer_config.json, of several the one called default; "" if there is none."""
    template = config.get("chat_template") or ""
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), "")
    return template


def _resolve(config: Mapping[str, Any], added: Mapping[str, int], where: str) -> dict[str, str]:
    """The name of the added token for each role of `_NAMES` that has one."""
    names: dict[str, str] = {}
    for role, usual in _NAMES.items():
        said = config.get(role)
        said = said.get("content") if isinstance(said, dict) else said  # an AddedToken, spelt out
        if said is not None and not (isinstance(said, str) and said in added):
            raise refusal(where, f"its tokenizer_config.json has {role} {said!r}, which isn't among its added_tokens")
        taken = [names[bound] for bound in ("bos_token", "eos_token") if bound in names]
        if role in ("pad_token", "mask_token") and said in taken:
            said = None
        found = said or next((name for name in usual if name in added and name not in taken), None)
        if found is not None:
            names[role] = found
    if "eos_token" not in names:
        known = ", ".join(_NAMES["eos_token"])
        raise refusal(
            where,
            f"none of its added_tokens is known to end a text ({known}): name one as eos_token in a "
            "tokenizer_config.json beside it",
        )
    names.setdefault("bos_token", names["eos_token"])
    return names


def _vocab(model: Mapping[str, Any]) -> dict[str, int]:
    """The tokens of the model and their ids, without added tokens."""
    vocab = model["vocab"]
    return vocab if isinstance(vocab, dict) else {token: index for index, (token, _) in enumerate(vocab)}


def _unknown(model: Mapping[str, Any], added: Mapping[str, int]) -> int:
    """The id of the unknown token, -1 if there is none."""
    if model.get("unk_id") is not None:  # Unigram's
        return model["unk_id"]
    known = _vocab(model) | dict(added)
    return next((known[name] for name in (model.get("unk_token"), *_UNKNOWN_NAMES) if name in known), -1)


def _secret(index: int) -> str:
    return f"{SECRET}{index}{SECRET}"


def _hide_specials(content: dict[str, Any]) -> None:
    """Makes special tokens unreachable from text, in place.

    The package doesn't look for them in text with encode_special_tokens; but where they are in the model's own
    vocabulary, a Unigram model finds them in text, and merges may lead there. So they are given names that no text
    has: U+FFFF is no character.
    """
    model, added = content["model"], content["added_tokens"]
    secret = {token["content"]: _secret(token["id"]) for token in added if token["special"]}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {secret.get(token, token): index for token, index in model["vocab"].items()}
    else:
        model["vocab"] = [[secret.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = secret.get(model["unk_token"], model["unk_token"])
    if model["type"] == "BPE":
        model["merges"] = [pair for pair in model["merges"] if secret.keys().isdisjoint((*pair, "".join(pair)))]
    for token in added:
        token["content"] = secret.get(token["content"], token["content"])


def _build(content: dict[str, Any]) -> tokenizers.Tokenizer:
    content = content | {"truncation": None, "padding": None, "post_processor": None}
    content["model"].pop("dropout", None)  # would give other ids each time
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True  # special tokens in text are text
    return tokenizer
