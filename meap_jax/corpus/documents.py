"""Documents as text with spans or as conversations, and the same documents as token ids with spans of tokens."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from meap_jax.data.store import EncodedDocument, TokenSpan
from meap_jax.errors import DataError
from meap_jax.readers import Conversation, Skips
from meap_jax.tokenizers import Tokenizer
from meap_jax.tokenizers.interface import batches

_BATCH_CHARACTERS = 4_000_000  # That are encoded at a time: documents can be books ...
_MIN_CHARACTERS = _BATCH_CHARACTERS // 256  # ... and a document counts as so many at least: 256 at a time are enough.


class Span(NamedTuple):
    """The characters start ... end - 1 of a document, and what they are."""

    start: int
    end: int
    role: str  # Such as answer, fact, loss; a word of letters, which names the file that it is stored in.
    columns: Mapping[str, float] = {}  # What else is known of it: the same names in every span of a role.


class Document(NamedTuple):
    """A text and its spans, in any order."""

    text: str
    spans: tuple[Span, ...] = ()


class ChatDocument(NamedTuple):
    """A conversation, and how it becomes text."""

    conversation: Conversation
    template: str  # In Jinja.

    @property
    def text(self) -> str:
        """What is said in it, without what the template adds."""
        return "\n".join(message["content"] for message in self.conversation.messages)


def encode(
    documents: Iterable[tuple[int, Document | ChatDocument | EncodedDocument]], tokenizer: Tokenizer, skips: Skips
) -> Iterator[tuple[int, EncodedDocument]]:
    """Encodes documents of any kind, in order and lazily; conversations that can't be are counted by `skips`.

    Args:
      documents: each behind the number of its split, which stays with it.
      tokenizer: gives the ids.
      skips: counts conversations that the template refuses.

    Raises:
      DataError: `skips` has reached its limit.
      ValueError: a span holds no character of its document.
    """
    runs: Iterator[tuple[type, Iterable[Any]]] = groupby(documents, lambda item: type(item[1]))
    for kind, run in runs:
        if kind is EncodedDocument:
            yield from run
        elif kind is ChatDocument:
            yield from _encode_chats(run, tokenizer, skips)
        else:
            yield from encode_documents(run, tokenizer)


def _encode_chats(
    documents: Iterable[tuple[int, ChatDocument]], tokenizer: Tokenizer, skips: Skips
) -> Iterator[tuple[int, EncodedDocument]]:
    """Each answer becomes a span of the role `answer` with the `line` of its record; its last token ends it."""
    for split, ((messages, line, place), template) in documents:
        try:
            ids, answers = tokenizer.encode_conversation(messages, template)
        except DataError as error:
            skips.add(f"is refused: {str(error).rstrip('.')}", place)
            continue
        spans = tuple(TokenSpan(start, length, "answer", {"line": line}) for start, length in answers)
        yield split, EncodedDocument(ids, spans)


def encode_documents(
    documents: Iterable[tuple[int, Document]], tokenizer: Tokenizer
) -> Iterator[tuple[int, EncodedDocument]]:
    """Encodes documents as bos + text + eos, in order and lazily, with their spans in tokens.

    The bos in front and the eos behind are what the official pre-training data has.

    Args:
      documents: each behind the number of its split, which stays with it.
      tokenizer: gives the ids.

    Raises:
      ValueError: a span holds no character of its document.
    """
    for batch in batches(documents, lambda item: max(len(item[1].text), _MIN_CHARACTERS), _BATCH_CHARACTERS):
        texts = [document.text for _, document in batch]
        if any(document.spans for _, document in batch):
            encoded = tokenizer.encode_with_offsets(texts)
        else:  # Offsets take their time.
            encoded = [(ids, np.zeros((0, 2), np.int64)) for ids in tokenizer.encode_batch(texts)]
        for (split, document), (ids, offsets) in zip(batch, encoded, strict=True):
            ids = [tokenizer.bos_id, *ids, tokenizer.eos_id]
            yield split, EncodedDocument(ids, token_spans(document, offsets))


def token_spans(document: Document, offsets: np.ndarray) -> tuple[TokenSpan, ...]:
    """The spans of a document in tokens: a token belongs to every span that it overlaps.

    Args:
      document: the text and its spans.
      offsets: [N, 2], the characters of each of its N tokens, as of `Tokenizer.encode_with_offsets`.

    Returns:
      A span each, in their order; positions count the bos in front. One whose characters the tokenizer drops, as some
      do with blank space, has the length 0.

    Raises:
      ValueError: a span holds no character of the document.
    """
    for span in document.spans:
        if not 0 <= span.start < span.end <= len(document.text):
            raise ValueError(f"{span} holds no character of a text of {len(document.text)}.")
    starts, ends = np.array([span[:2] for span in document.spans], np.int64).reshape(-1, 2).T
    first = np.searchsorted(offsets[:, 1], starts, side="right")  # The first token that ends behind the start ...
    stop = np.searchsorted(offsets[:, 0], ends, side="left")  # ... and the first that doesn't start before the end.
    return tuple(
        TokenSpan(1 + start, length, span.role, span.columns)
        for span, start, length in zip(document.spans, first.tolist(), (stop - first).tolist(), strict=True)
    )
