"""Two tokenizers behind one interface: a small BPE trained here, and a 32,000-piece model."""

import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from meap_jax.config import ConfigError

_SPECIALS = ("<pad>", "<bos>", "<eos>", "[MASK]")  # ids 0 to 3 of every BPE
_SMALLEST_BPE = len(_SPECIALS) + 256
_BPE_FILE = "tokenizer.json"
_SENTENCEPIECE_FILE = "tokenizer.model"


class Tokenizer(Protocol):
    """What the rest of the code knows of a tokenizer. Text never encodes to a special id."""

    @property
    def name(self) -> str:
        """The config's word for it."""

    @property
    def bos_id(self) -> int:
        """Begins every document."""

    @property
    def eos_id(self) -> int:
        """Ends every document."""

    @property
    def pad_id(self) -> int:
        """Fills what is left of a block; never seen by the loss."""

    @property
    def mask_id(self) -> int:
        """The [MASK] of MEAP."""

    @property
    def num_tokens(self) -> int:
        """Ids that have a meaning, specials included."""

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding: `num_tokens` rounded up to a multiple of 64."""

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of a text, without specials; `continues` if it stands in the middle of a document."""

    def encode_batch(self, texts: Sequence[str], continues: bool = False) -> list[list[int]]:
        """The same for many texts, faster."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, an array's or a list's; specials appear by name."""

    def files(self) -> dict[str, bytes]:
        """File names and contents that `load` rebuilds this tokenizer from."""


def round_up(size: int, multiple: int = 64) -> int:
    """The paper's 32,001 ids become 32,064 rows: matrix units like multiples of 64."""
    return -(-size // multiple) * multiple


class BPETokenizer:
    """Byte-level BPE: `decode(encode(text)) == text` for every text."""

    name = "bpe"
    pad_id, bos_id, eos_id, mask_id = range(4)

    def __init__(self, serialized: str):
        """Rebuilds a tokenizer from the JSON of the `tokenizers` package."""
        self._serialized = serialized
        self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        self.num_tokens: int = self._tokenizer.get_vocab_size()
        self.vocab_size = round_up(self.num_tokens)

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of a text; bytes read the same at the beginning and in the middle of a document."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], continues: bool = False) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def files(self) -> dict[str, bytes]:
        """The JSON file of the `tokenizers` package."""
        return {_BPE_FILE: self._serialized.encode("utf-8")}


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


class SentencePieceTokenizer:
    """A 32,000-piece SentencePiece model with Llama's ids, plus [MASK] = 32000 as in the paper.

    `decode(encode(text)) == text` unless the text holds U+2581, SentencePiece's own space.
    """

    name = "mistral"
    bos_id, eos_id = 1, 2
    # <unk>: this model spells what it doesn't know in bytes, so no text ever gives this id, and
    # padding stays distinct from the eos that ends a document. Llama recipes pad with it too.
    pad_id = 0

    def __init__(self, model: bytes):
        """Rebuilds a tokenizer from a serialized SentencePiece model."""
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.mask_id: int = self._processor.vocab_size()
        self.num_tokens = self.mask_id + 1
        self.vocab_size = round_up(self.num_tokens)
        self._specials = {
            self.pad_id: "<unk>",
            self.bos_id: "<s>",
            self.eos_id: "</s>",
            self.mask_id: "[MASK]",
        }

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of a text; a space is put in front only where a document begins."""
        return self.encode_batch([text], continues)[0]

    def encode_batch(self, texts: Sequence[str], continues: bool = False) -> list[list[int]]:
        """Ids of many texts."""
        if not continues:
            return self._processor.encode(list(texts))
        # A newline is always a piece of its own, so what follows it reads as in mid-text; the two
        # ids in front are those of the added space and of the newline.
        return [ids[2:] for ids in self._processor.encode(["\n" + text for text in texts])]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        # A newline in front keeps the first space of what stands in mid-text.
        newline = self._processor.piece_to_id("<0x0A>")
        text, start = "", 0
        ids = list(ids)
        for special in [*(i for i, token in enumerate(ids) if token in self._specials), len(ids)]:
            run = ids[start:special]
            if start == 0 or ids[start - 1] == self.bos_id:
                text += self._processor.decode(run)
            else:
                text += self._processor.decode([newline, *run])[1:]
            text += self._specials[ids[special]] if special < len(ids) else ""
            start = special + 1
        return text

    def files(self) -> dict[str, bytes]:
        """The SentencePiece model."""
        return {_SENTENCEPIECE_FILE: self._model}


def mistral() -> SentencePieceTokenizer:
    """The 32,000-piece model that the package mistral-common (Apache-2.0) carries.

    Raises:
      ConfigError: the package isn't installed.
    """
    # find_spec doesn't run the package, whose import takes seconds.
    spec = importlib.util.find_spec("mistral_common")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        path = Path(folder, "data", "tokenizer.model.v1")
        if path.is_file():
            return SentencePieceTokenizer(path.read_bytes())
    raise ConfigError(
        "data.tokenizer is 'mistral', but the package mistral-common, which carries "
        "its model, is not installed: pip install mistral-common."
    )


def load(folder: str | Path) -> Tokenizer:
    """Rebuilds the tokenizer whose `files()` were written into a folder.

    Raises:
      FileNotFoundError: the folder holds neither tokenizer.json nor tokenizer.model.
    """
    bpe = Path(folder, _BPE_FILE)
    if bpe.is_file():
        return BPETokenizer(bpe.read_text(encoding="utf-8"))
    return SentencePieceTokenizer(Path(folder, _SENTENCEPIECE_FILE).read_bytes())
