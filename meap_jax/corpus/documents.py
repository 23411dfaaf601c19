"""Documents as pieces of text, and the same documents as token ids with the places of answers."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from meap_jax.data.store import AnswerSpan, EncodedDocument
from meap_jax.tokenizers import Tokenizer

# Pieces are encoded in batches, and short ones are remembered: a retrieval document is made of a
# few hundred different pieces that come back in every document.
_BATCH = 256
_BATCH_CHARACTERS = 4_000_000  # Ends a batch sooner: documents can be books.
_CACHED_LENGTH = 200
_CACHED_PIECES = 100_000


class Answer(NamedTuple):
    """Which piece of a document answers a question, and which piece had stated that answer."""

    piece: int
    fact: int
    depth: float  # 0 = the first fact of the document, 1 = the last one


class Document(NamedTuple):
    """Text in order, in pieces that are tokenised one by one so that answers have exact spans."""

    pieces: tuple[str, ...]
    answers: tuple[Answer, ...] = ()

    @property
    def text(self) -> str:
        """The document as one string."""
        return "".join(self.pieces)


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[EncodedDocument]:
    """Encodes documents piece by piece as bos + pieces + eos, in order and lazily.

    The bos in front and the eos behind are what the official pre-training data has.

    Args:
      documents: the documents.
      tokenizer: gives the ids; the first piece opens a text, all others continue it.

    Yields:
      One `EncodedDocument` a document.
    """
    cache: dict[tuple[str, bool], list[int]] = {}
    stream = iter(documents)
    while batch := _next_batch(stream):
        known = dict(cache)
        for continues in (False, True):
            new = [
                piece
                for document in batch
                for piece in (document.pieces[1:] if continues else document.pieces[:1])
                if (piece, continues) not in known
            ]
            new = list(dict.fromkeys(new))
            for piece, ids in zip(new, tokenizer.encode_batch(new, continues), strict=True):
                known[piece, continues] = ids
                if len(piece) <= _CACHED_LENGTH and len(cache) < _CACHED_PIECES:
                    cache[piece, continues] = ids
        for document in batch:
            yield _assemble(document, known, tokenizer)


def _next_batch(stream: Iterator[Document]) -> list[Document]:
    batch: list[Document] = []
    room = _BATCH_CHARACTERS
    for document in islice(stream, _BATCH):
        batch.append(document)
        room -= sum(map(len, document.pieces))
        if room <= 0:
            break
    return batch


def _assemble(document: Document, known: dict[tuple[str, bool], list[int]], tokenizer: Tokenizer) -> EncodedDocument:
    ids = [tokenizer.bos_id]
    starts = []
    for index, piece in enumerate(document.pieces):
        starts.append(len(ids))
        ids.extend(known[piece, index > 0])
    starts.append(len(ids))
    ids.append(tokenizer.eos_id)
    answers = tuple(
        AnswerSpan(
            starts[answer.piece],
            starts[answer.piece + 1] - starts[answer.piece],
            starts[answer.fact],
            answer.depth,
        )
        for answer in document.answers
    )
    return EncodedDocument(ids, answers)
