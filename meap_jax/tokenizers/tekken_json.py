"""Tekken, Mistral's byte-level tokenizer of 131,072 ids, by tiktoken."""

import base64
from typing import Any

import numpy as np
import tiktoken

from meap_jax.tokenizers.interface import Encoded, Tokenizer, refusal

# The first special ids of files that don't list them, v3 and v7, as the package mistral-common numbers them.
_UNLISTED = {0: "<unk>", 1: "<s>", 2: "</s>", 11: "<pad>"}
_MASK_NAMES = ("[MASK]", "<mask>")


class TekkenTokenizer(Tokenizer):
    """Special ids come first, then those of text; [MASK] is the next free one, 131072, unless the file has one.

    `decode(encode(text)) == text` for every text. Bytes that are no UTF-8, as of half a character, decode to U+FFFD.
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
        self.num_own_ids: int = size
        self.num_tokens: int = max(size, self.mask_id + 1)
        self._specials = {index: f"<SPECIAL_{index}>" for index in range(num_special)}
        self._specials |= {self.mask_id: "[MASK]"} | names

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [self._encoding.encode_ordinary(text) for text in texts]

    def _encode_with_offsets(self, texts: list[str]) -> list[Encoded]:
        return [(ids, self._offsets(text, ids)) for text, ids in zip(texts, self._encode(texts), strict=True)]

    def _offsets(self, text: str, ids: list[int]) -> np.ndarray:
        """The characters that hold each token's bytes, [N, 2]."""
        begins_character = np.frombuffer(text.encode(), np.uint8) & 0xC0 != 0x80
        character = np.cumsum(begins_character) - 1  # Of each byte.
        ends = np.cumsum([len(token) for token in self._encoding.decode_tokens_bytes(ids)], dtype=np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
        return np.stack([character[starts], character[ends - 1] + 1], axis=1)

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)

    def files(self) -> dict[str, bytes]:
        """The tekken.json."""
        return {"tekken.json": self._serialized}
