"""SentencePiece models: Llama's, Mistral's v1, and any other `tokenizer.model`."""

from collections.abc import Sequence

import sentencepiece

from meap_jax.tokenizers.interface import decode_ids, encode_texts, refusal, round_up

_MASK_NAMES = ("[MASK]", "<mask>")


class SentencePieceTokenizer:
    """A SentencePiece model with its own ids, plus [MASK]: 32000, as in the paper, where it has 32,000 pieces.

    `decode(encode(text)) == text` for models that spell unknown characters in bytes and don't normalize, as Llama's
    and Mistral's, unless the text holds U+2581, SentencePiece's own space.
    """

    name = "sentencepiece"

    def __init__(self, model: bytes, where: str = "tokenizer.model"):
        """Rebuilds a tokenizer from a serialized SentencePiece model.

        Args:
          model: the content of a `tokenizer.model`.
          where: its path, for the errors.

        Raises:
          ConfigError: it is no such model, or one without bos or eos.
        """
        self._model = model
        if not model:  # A protocol buffer all the same, in which nothing is set.
            raise refusal(where, "is a SentencePiece model without pieces")
        try:
            self._opens = sentencepiece.SentencePieceProcessor()
            self._opens.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise refusal(where, "is not a SentencePiece model") from error
        # Three more readings of the same pieces. In mid-document no space is put in front of the text. A model that
        # removes extra spaces would remove one that is there, so it reads such text as if it opened a document, with
        # the space that it puts in front. And what is decoded in mid-document keeps its first space.
        self._continues = _read_as(model, add_dummy_prefix=False)
        self._decodes = _read_as(model, add_dummy_prefix=False, remove_extra_whitespaces=False)
        extra = "  a  b  "
        self._squeezes = self._continues.normalize(extra) != self._decodes.normalize(extra)
        self._spaced = _read_as(model, add_dummy_prefix=True) if self._squeezes else self._continues

        self.bos_id: int = self._opens.bos_id()
        self.eos_id: int = self._opens.eos_id()
        for kind, token in (("bos", self.bos_id), ("eos", self.eos_id)):
            if token < 0:
                raise refusal(where, f"is a SentencePiece model without {kind}: train it with one (--{kind}_id)")
        self.num_tokens: int = self._opens.vocab_size()
        pieces = range(self.num_tokens)
        self._specials = {piece: self._opens.id_to_piece(piece) for piece in pieces if self._opens.is_control(piece)}
        # User-defined symbols are found in text; only a control symbol can be the [MASK] that text never gives.
        own = [index for index, piece in self._specials.items() if piece in _MASK_NAMES]
        self.mask_id = own[0] if own else self.num_tokens
        self.num_tokens = max(self.num_tokens, self.mask_id + 1)
        self.vocab_size = round_up(self.num_tokens)
        # Llama's and Mistral's have no pad. Their <unk> stands in, as in Llama recipes: what they don't know they
        # spell in bytes, so no text ever gives this id, and padding stays distinct from the eos of a document.
        pad, unknown = self._opens.pad_id(), self._opens.unk_id()
        self.pad_id: int = unknown if pad in (-1, self.bos_id, self.eos_id) else pad
        self._specials |= {unknown: self._opens.id_to_piece(unknown)}
        self._specials.setdefault(self.mask_id, "[MASK]")

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of a text; a space is put in front only where a document begins."""
        return self.encode_batch([text], continues)[0]

    def encode_batch(self, texts: Sequence[str], continues: bool = False) -> list[list[int]]:
        """Ids of many texts, on one core."""
        return encode_texts(texts, continues, self._encode)

    def _encode(self, texts: list[str], continues: bool) -> list[list[int]]:
        if continues and self._squeezes:
            return [(self._spaced if text[:1].isspace() else self._continues).encode(text) for text in texts]
        return (self._continues if continues else self._opens).encode(texts, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return decode_ids(ids, self._specials, self.bos_id, self.num_tokens, self._decode)

    def _decode(self, ids: list[int], continues: bool) -> str:
        return (self._decodes if continues else self._opens).decode(ids)

    def files(self) -> dict[str, bytes]:
        """The SentencePiece model."""
        return {"tokenizer.model": self._model}


def _read_as(model: bytes, **normalizer: bool) -> sentencepiece.SentencePieceProcessor:
    """A model with other fields in its NormalizerSpec.

    Where a protocol buffer has a message twice, the later one's fields count: the new ones are put behind the rest.
    (sentencepiece_model_pb2 could change them too, but is for the newest protobuf alone, and Beam needs an older one.)
    """
    # Numbers of sentencepiece_model.proto: ModelProto.normalizer_spec is 3, and in it
    numbers = {"add_dummy_prefix": 3, "remove_extra_whitespaces": 4}
    spec = bytes(byte for name, value in normalizer.items() for byte in (numbers[name] << 3, value))
    processor = sentencepiece.SentencePieceProcessor()
    processor.load_from_serialized_proto(model + bytes([3 << 3 | 2, len(spec)]) + spec)
    return processor
