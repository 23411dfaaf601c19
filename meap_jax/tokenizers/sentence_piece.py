"""SentencePiece models: Llama's, Mistral's v1, and any other `tokenizer.model`."""

import numpy as np
import sentencepiece

from meap_jax.tokenizers.interface import Encoded, Tokenizer, refusal

_MASK_NAMES = ("[MASK]", "<mask>")


class SentencePieceTokenizer(Tokenizer):
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
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise refusal(where, "is not a SentencePiece model") from error

        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        for kind, token in (("bos", self.bos_id), ("eos", self.eos_id)):
            if token < 0:
                raise refusal(where, f"is a SentencePiece model without {kind}: train it with one (--{kind}_id)")
        self.num_tokens = self.num_own_ids = self._processor.vocab_size()
        controls = filter(self._processor.is_control, range(self.num_tokens))
        self._specials = {piece: self._processor.id_to_piece(piece) for piece in controls}
        # User-defined symbols are found in text; only a control symbol can be the [MASK] that text never gives.
        own = [index for index, piece in self._specials.items() if piece in _MASK_NAMES]
        self.mask_id = own[0] if own else self.num_tokens
        self.num_tokens = max(self.num_tokens, self.mask_id + 1)
        # Llama's and Mistral's have no pad. Their <unk> stands in, as in Llama recipes: what they don't know they
        # spell in bytes, so no text ever gives this id, and padding stays distinct from the eos of a document.
        pad, unknown = self._processor.pad_id(), self._processor.unk_id()
        self.pad_id: int = unknown if pad in (-1, self.bos_id, self.eos_id) else pad
        self._specials |= {unknown: self._processor.id_to_piece(unknown)}
        self._specials.setdefault(self.mask_id, "[MASK]")

    def files(self) -> dict[str, bytes]:
        """The SentencePiece model."""
        return {"tokenizer.model": self._model}

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=1)

    def _encode_with_offsets(self, texts: list[str]) -> list[Encoded]:
        found = self._processor.encode(texts, num_threads=1, return_type="offset_mapping")
        return [(text["ids"], np.array(text["offsets"], np.int64).reshape(-1, 2)) for text in found]

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)
