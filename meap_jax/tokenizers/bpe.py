"""The byte-level BPE that is trained on a run's own corpus."""

import json
from collections.abc import Iterable
from typing import Any

import tokenizers
from meap_jax.errors import ConfigError
from meap_jax.tokenizers.hugging_face import PackageTokenizer

_SPECIALS = ("<pad>", "<bos>", "<eos>", "[MASK]")  # ids 0 to 3 of every BPE
_SMALLEST_BPE = len(_SPECIALS) + 256


class BPETokenizer(PackageTokenizer):
    """Byte-level BPE: `decode(encode(text)) == text` for every text."""

    name = "bpe"
    pad_id, bos_id, eos_id, mask_id = range(4)
    _specials = dict(enumerate(_SPECIALS))

    def __init__(self, serialized: str):
        """Rebuilds a tokenizer from the JSON of the `tokenizers` package."""
        self._serialized = serialized
        self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        self.num_tokens = self.num_own_ids = self._tokenizer.get_vocab_size()

    def files(self) -> dict[str, bytes]:
        """The JSON file of the `tokenizers` package."""
        return {"tokenizer.json": self._serialized.encode("utf-8")}


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Trains a byte-level BPE; equal texts give an equal tokenizer.

    Args:
      texts: what the merges are learned from.
      vocab_size: ids at most, specials and the 256 bytes among them; a small corpus gives fewer.

    Returns:
      The tokenizer; <pad>, <bos>, <eos> and [MASK] are its ids 0, 1, 2, 3.

    Raises:
      ConfigError: vocab_size is too small for the bytes and the specials.
    """
    if vocab_size < _SMALLEST_BPE:
        raise ConfigError(
            f"model.vocab_size is {vocab_size}: a byte-level BPE needs at least "
            f"{_SMALLEST_BPE}, the 256 bytes and {len(_SPECIALS)} special tokens."
        )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIALS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    serialized = json.loads(tokenizer.to_str())
    # The specials keep their ids but are no longer looked for in text: a user's "<eos>" is five
    # characters. No merge can make them, since letters and punctuation never share a pre-token.
    serialized["added_tokens"] = []
    return BPETokenizer(json.dumps(serialized, ensure_ascii=False, separators=(",", ":")))


def trained_here(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is one of `train_bpe`, of this run or of another."""
    vocab = content["model"].get("vocab")
    return (
        not content.get("added_tokens")
        and isinstance(vocab, dict)
        and all(vocab.get(special) == index for index, special in enumerate(_SPECIALS))
    )
