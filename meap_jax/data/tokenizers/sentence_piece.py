"""SentencePiece models: Llama's, Mistral's v1, and any other `tokenizer.model`."""

from collections.abc import Sequence
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from meap_jax.data.tokenizers.interface import decode_ids, encode_texts, refusal, round_up

_MASK_NAMES = ("[MASK]", "<mask>")
_PROTO: Any = sentencepiece_model_pb2  # its classes are made when it is imported, unseen by mypy


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
        try:
            proto = _PROTO.ModelProto.FromString(model)
            self._opens = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # protobuf's DecodeError, which two implementations define, and RuntimeError
            raise refusal(where, "is not a SentencePiece model") from error
        if not proto.pieces:
            raise refusal(where, "is a SentencePiece model without pieces")
        normalizer = proto.normalizer_spec
        self._squeezes: bool = normalizer.remove_extra_whitespaces
        # Three more readings of the same pieces. In mid-document no space is put in front of the text. A model that
        # removes extra spaces would remove one that is there, so it reads such text as if it opened a document, with
        # the space that it puts in front. And what is decoded in mid-document keeps its first space.
        normalizer.add_dummy_prefix = False
        self._continues = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._spaced = self._decodes = self._continues
        if self._squeezes:
            normalizer.add_dummy_prefix = True
            self._spaced = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
            normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
            self._decodes = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

        self.bos_id: int = self._opens.bos_id()
        self.eos_id: int = self._opens.eos_id()
        for kind, token in (("bos", self.bos_id), ("eos", self.eos_id)):
            if token < 0:
                raise refusal(where, f"is a SentencePiece model without {kind}: train it with one (--{kind}_id)")
        self.num_tokens: int = self._opens.vocab_size()
        control = _PROTO.ModelProto.SentencePiece.CONTROL
        self._specials = {index: piece.piece for index, piece in enumerate(proto.pieces) if piece.type == control}
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
