"""Tekken, Mistral's byte-level tokenizer of 131,072 ids, by tiktoken."""

import base64
from collections.abc import Sequence
from typing import Any

import tiktoken

from meap_jax.tokenizers.interface import decode_ids, encode_texts, refusal, round_up

# The first special ids of files that don't list them, v3 and v7, as the package mistral-common numbers them.
_UNLISTED = {0: "<unk>", 1: "<s>", 2: "</s>", 11: "<pad>"}
_MASK_NAMES = ("[MASK]", "<mask>")


class TekkenTokenizer:
    """Special ids come first, then those of text; [MASK] is the next free one, 131072, unless the file has one.

    `decode(encode(text)) == text` for every text.
    """

    name = "tekken"

    def __init__(self, serialized: bytes, content: dict[str, Any], where: str = "tekken.json"):
        """Rebuilds a tokenizer from a tekken.json.

        Args:
          serialized: the file.
          content: the same, parsed.
          where: its path, for the errors.

        Raises:
          ConfigError: it is no such file, or one without <s> or </s>.
        """
        self._serialized = serialized
        try:
            config = content["config"]
            size, num_special = config["default_vocab_size"], config["default_num_special_tokens"]
            vocab = content["vocab"][: size - num_special]  # the file has more than are used
            self._encoding = tiktoken.Encoding(
                name="tekken",
                pat_str=config["pattern"],
                # Only the order of ranks matters to the merges, so they can be the ids.
                mergeable_ranks={base64.b64decode(v["token_bytes"]): v["rank"] + num_special for v in vocab},
                special_tokens={},  # so that no text is one
            )
            listed = content.get("special_tokens")
            names = _UNLISTED if listed is None else {entry["rank"]: entry["token_str"] for entry in listed}
        except (KeyError, TypeError, ValueError) as error:
            raise refusal(where, "is not a tekken.json that can be read") from error
        if len(vocab) != size - num_special:
            raise refusal(where, f"lists {len(vocab)} tokens of the {size - num_special} that it announces")
        ids = {name: index for index, name in names.items()}
        for bound in ("<s>", "</s>"):
            if bound not in ids:
                raise refusal(where, f"is a tekken.json without {bound} among its special_tokens")
        self.bos_id, self.eos_id = ids["<s>"], ids["</s>"]
        self.mask_id: int = next((ids[name] for name in _MASK_NAMES if name in ids), size)
        # A Tekken without <pad> has its <unk>, which bytes never give, in the place 0.
        self.pad_id: int = ids.get("<pad>", ids.get("<unk>", 0))
        self.num_tokens: int = max(size, self.mask_id + 1)
        self.vocab_size = round_up(self.num_tokens)
        self._specials = {index: f"<SPECIAL_{index}>" for index in range(num_special)}
        self._specials |= {self.mask_id: "[MASK]"} | names

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of a text; bytes read the same at the beginning and in the middle of a document."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], continues: bool = False) -> list[list[int]]:
        """Ids of many texts, on one core."""
        return encode_texts(texts, continues, self._encode)

    def _encode(self, texts: list[str], continues: bool) -> list[list[int]]:
        return [self._encoding.encode_ordinary(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are no UTF-8, as of half a character, become U+FFFD."""
        return decode_ids(ids, self._specials, self.bos_id, self.num_tokens, self._decode)

    def _decode(self, ids: list[int], continues: bool) -> str:
        return self._encoding.decode(ids)

    def files(self) -> dict[str, bytes]:
        """The tekken.json."""
        return {"tekken.json": self._serialized}
