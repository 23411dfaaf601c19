"""What every tokenizer promises, and what they share: cleaning, cutting and batching of texts, and specials by name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from meap_jax.errors import ConfigError

# Longer texts are encoded in pieces of at most so many characters. That keeps memory flat, and out of reach of what
# libraries do with a million equal characters: the regular expression of Tekken overflows its stack at one million
# spaces (at 100,000 it is fast).
MAX_PIECE = 1 << 16
# What is handed to a library at once, in characters: Hugging Face's encodings take about 100 bytes an id until ours
# are taken out of them.
_MAX_BATCH = 1 << 20


class Tokenizer(Protocol):
    """What the rest of the code knows of a tokenizer. Text never encodes to bos, eos or [MASK].

    Nor to the padding id, unless the tokenizer pads with its unknown token and text gives that.

    Lone surrogates, which JSON can smuggle into a str, are encoded as U+FFFD; everything else that a str can hold
    is the tokenizer's own matter: byte-level and byte-fallback ones without a normalizer give every text back.

    A text of more than `MAX_PIECE` characters is cut at a space between two words, which no usual tokenizer joins:
    its ids are those of the uncut text. Only where a piece holds no such space (65,536 characters of Chinese, of one
    letter, of blanks) it is cut hard, and the ids next to the cut may differ; the text they decode to doesn't.
    """

    @property
    def name(self) -> str:
        """Its kind: bpe, sentencepiece, huggingface or tekken."""

    @property
    def bos_id(self) -> int:
        """Begins every document; the same as eos_id where a tokenizer has only one of them, as GPT-2's."""

    @property
    def eos_id(self) -> int:
        """Ends every document."""

    @property
    def pad_id(self) -> int:
        """Fills what is left of a block; never seen by the loss. Distinct from bos, eos and [MASK]."""

    @property
    def mask_id(self) -> int:
        """The [MASK] of MEAP: the tokenizer's own if it has one, else the first free id."""

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


def refusal(where: str, problem: str) -> ConfigError:
    """The error about the tokenizer that `where`, the config's word or path, names."""
    return ConfigError(f"data.tokenizer is {where!r}, but {problem}.")


def round_up(size: int, multiple: int = 64) -> int:
    """The paper's 32,001 ids become 32,064 rows: matrix units like multiples of 64."""
    return -(-size // multiple) * multiple


def clean(text: str) -> str:
    """Joins surrogate pairs and replaces lone surrogates by U+FFFD, as decoders of invalid UTF-8 do."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def cut(text: str) -> Iterator[str]:
    """Cuts a text into pieces of at most `MAX_PIECE` characters, if it can in front of a space between two words."""
    start = 0
    while len(text) - start > MAX_PIECE:
        stop = start + MAX_PIECE
        place = text.rfind(" ", start + 1, stop)
        while place > 0 and not (text[place - 1].isalnum() and text[place + 1].isalnum()):
            place = text.rfind(" ", start + 1, place)
        stop = place if place > 0 else stop
        yield text[start:stop]
        start = stop
    yield text[start:]


def encode_texts(
    texts: Sequence[str], continues: bool, encode: Callable[[list[str], bool], list[list[int]]]
) -> list[list[int]]:
    """Cleans texts, cuts long ones, and has them encoded in batches of limited size.

    Args:
      texts: any strings.
      continues: whether they stand in the middle of documents.
      encode: what encodes a list of short texts, which all open a document or all continue one.

    Returns:
      The ids of each text.
    """
    results: list[list[int]] = []
    batch: list[str] = []
    num_characters = 0
    for text in map(clean, texts):
        if batch and num_characters + len(text) > _MAX_BATCH:
            results += encode(batch, continues)
            batch, num_characters = [], 0
        if len(text) <= MAX_PIECE:
            batch.append(text)
            num_characters += len(text)
            continue
        if batch:
            results += encode(batch, continues)
            batch, num_characters = [], 0
        ids: list[int] = []
        for index, piece in enumerate(cut(text)):
            ids += encode([piece], continues or index > 0)[0]
        results.append(ids)
    return results + encode(batch, continues) if batch else results


def decode_ids(
    ids: Sequence[int],
    specials: Mapping[int, str],
    bos_id: int,
    num_tokens: int,
    decode: Callable[[list[int], bool], str],
) -> str:
    """Decodes what stands between specials, and puts these in by name.

    Args:
      ids: of text and specials; rows that only pad the vocabulary appear as <id>.
      specials: the name of each special id.
      bos_id: what follows it opens a document.
      num_tokens: ids from this one on mean nothing.
      decode: gives the text of ids without specials; its second argument is False where they open a document, and
        True where they continue one, whose first space is to be kept.
    """
    text, run, continues = "", [], False
    for token in map(int, ids):
        if token < num_tokens and token not in specials:
            run.append(token)
            continue
        text += (decode(run, continues) if run else "") + specials.get(token, f"<{token}>")
        run, continues = [], token != bos_id
    return text + (decode(run, continues) if run else "")
