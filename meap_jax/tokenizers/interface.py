"""What tokenizers promise, and what all kinds share: cleaning, cutting and batching of texts; specials by name."""

import abc
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np

from meap_jax.errors import ConfigError, DataError

# Longer texts are encoded in chunks of about so many characters. That keeps memory flat, and out of reach of what
# libraries do with a million equal characters: the regular expression of Tekken overflows its stack at one million
# spaces (at 100,000 it is fast).
MAX_CHUNK = 1 << 16
# What is handed to a library at once, in characters: Hugging Face's encodings take about 100 bytes an id until ours
# are taken out of them.
_MAX_BATCH = 1 << 20

_SPACE_BETWEEN_WORDS = re.compile(r"(?<=[^\W_]) (?=[^\W_])")
_UP_TO_THE_LAST = re.compile(".*" + _SPACE_BETWEEN_WORDS.pattern, re.DOTALL)
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
SECRET, GUARD = "\uffff", "\ufffe"  # No characters of Unicode; templates and messages lose them.
# Texts to put in front of one that goes on after others: one of them is not joined with it.
_ANCHORS = ("a", "\n", ".", "0", "。")

_T = TypeVar("_T")
Encoded = tuple[list[int], np.ndarray]  # Ids, and [N, 2] int64: where each token's characters start and end.


class Tokenizer(abc.ABC):
    """What the rest of the code knows of a tokenizer. Text never encodes to bos, eos or [MASK].

    Nor to the padding id, unless the tokenizer pads with its unknown token and text gives that.

    Lone surrogates, which JSON can smuggle into a str, are encoded as U+FFFD; everything else that a str can hold
    is the tokenizer's own matter: byte-level and byte-fallback ones without a normalizer give every text back.

    A text of more than `MAX_CHUNK` characters is cut at spaces between two words, which no usual tokenizer joins: its
    ids are those of the uncut text. Where a chunk would hold no such space (65,536 characters of Chinese, of one
    letter, of blanks) it runs on to the next one. Only a tokenizer that puts nothing in front of a text is cut there
    all the same: the ids next to that cut may differ from those of the uncut text, but not the text they decode to.
    """

    name: str  # Its kind: bpe, sentencepiece, huggingface or tekken.
    bos_id: int  # Begins every document; the same as eos_id where a tokenizer has only one of them, as GPT-2's.
    eos_id: int  # Ends every document.
    pad_id: int  # Fills what is left of a block; never seen by the loss. Distinct from bos, eos and [MASK].
    mask_id: int  # The [MASK] of MEAP: the tokenizer's own if it has one, else the first free id.
    num_tokens: int  # Ids that have a meaning, specials included.
    num_own_ids: int  # Of these, the ids of its file: without [MASK] and padding that it lacks.
    chat_template: str = ""  # In Jinja; no part of `files`, since it changes no ids. Empty: there is none.
    _specials: Mapping[int, str]  # The names of special ids, which `_decode` never sees.

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """File names and contents that `load` rebuilds this tokenizer from."""

    @abc.abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that need no cutting."""

    @abc.abstractmethod
    def _encode_with_offsets(self, texts: list[str]) -> list[Encoded]:
        """The same with offsets; of several tokens of one character, some may hold an empty range in front of it."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of ids that open a document, without specials."""

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding: `num_tokens` rounded up to a multiple of 64."""
        return round_up(self.num_tokens)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without specials."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts; Hugging Face's kinds take all cores unless TOKENIZERS_PARALLELISM=false is set."""
        no_offsets = np.zeros((0, 2), np.int64)
        encoded = self._encode_all(texts, lambda batch: [(ids, no_offsets) for ids in self._encode(batch)])
        return [ids for ids, _ in encoded]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids of each text, and which characters each id comes from.

        Returns:
          For each text its N ids and offsets, [N, 2] int64: id i comes from text[offsets[i, 0] : offsets[i, 1]], the
          space in front of it included if there is one. Neither column ever decreases. Ids that share a character, as
          bytes do, all hold the whole of it; so does a space that the tokenizer puts in front of a text.
        """
        encoded = self._encode_all(texts, self._encode_with_offsets)
        return [(ids, _of_given(text, offsets)) for text, (ids, offsets) in zip(texts, encoded, strict=True)]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation in `chat_template`, up to where the assistant's next words begin.

        The template's special tokens become special ids; what looks like one in a message stays text.

        Args:
          messages: {"role": "system", "user" or "assistant", "content": text} each.

        Raises:
          DataError: there is no template, or it refuses the messages.
        """
        from meap_jax.tokenizers import chat  # Jinja is imported by those who chat alone.

        if not self.chat_template:
            raise DataError(
                f"the tokenizer ({self.name}) has no chat template: put one beside its file, as chat_template.jinja."
            )
        return self._encode_rendered(chat.render(self.chat_template, self._guarded(messages), self._names))

    def encode_conversation(
        self, messages: Sequence[Mapping[str, str]], template: str
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a conversation for training, and where its answers are.

        Each answer is encoded apart from what is in front of it, as the tokens that a model writes are, so that no
        token holds some of both.

        Args:
          messages: as of `encode_chat`.
          template: in Jinja.

        Returns:
          Ids, which begin with one bos and end with the last answer, and (start, length) of each answer in them. Its
          last token is the special token that ends it.

        Raises:
          DataError: nobody answers, the template refuses the messages, or answers can't be told from the rest.
        """
        from meap_jax.tokenizers import chat

        ids: list[int] = []
        answers = []
        said = self._guarded(messages)
        for prompt, answer in chat.prompts_and_answers(template, said, self._names, self.special_names):
            if not ids:
                ids = self._encode_rendered(prompt)
                num_bos = next((i for i, token in enumerate(ids) if token != self.bos_id), len(ids))
                ids = [self.bos_id, *ids[num_bos:]]
            else:  # Behind the special token that ended the answer before.
                ids += self._encode_rendered(self._specials[ids[-1]] + prompt)[1:]
            answer_ids = self._encode_continued(answer)
            answers.append((len(ids), len(answer_ids)))
            ids += answer_ids
        if not answers:
            raise DataError("the conversation has no answer of an assistant.")
        return ids, answers

    def end_of_answer(self, template: str) -> int:
        """The id of the special token that ends an answer in a template, at which generation stops.

        Raises:
          DataError: as `encode_conversation`, or the template doesn't write what announces an answer where it is asked
            for that alone.
        """
        from meap_jax.tokenizers import chat

        talk = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Reply"}]
        chat.check_announces(template, talk, self._names, self.special_names)
        return self.encode_conversation(talk, template)[0][-1]

    @functools.cached_property
    def special_names(self) -> re.Pattern[str]:
        """Finds the names of special tokens that its file has."""
        names = sorted(self._special_ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)))

    @functools.cached_property
    def _special_ids(self) -> dict[str, int]:
        return {name: index for index, name in self._specials.items() if index < self.num_own_ids}

    @functools.cached_property
    def _names(self) -> Mapping[str, str]:
        """What templates call special tokens, {"bos_token": "<s>", ...}."""
        return {"bos_token": self._specials[self.bos_id], "eos_token": self._specials[self.eos_id]}

    def _guarded(self, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """Messages in which what looks like a special token is broken up by a character that no text has."""

        def guarded(text: str) -> str:
            text = clean(text).replace(GUARD, "").replace(SECRET, "")
            return self.special_names.sub(lambda found: found[0][0] + GUARD + found[0][1:], text)

        return [{key: guarded(value) for key, value in message.items()} for message in messages]

    def _encode_rendered(self, text: str) -> list[int]:
        """Ids of what a template wrote of guarded messages; it opens a document."""
        ids: list[int] = []
        start, opens = 0, True
        for special in [*self.special_names.finditer(text), None]:
            run = text[start : special.start() if special else None].replace(GUARD, "")
            if run:
                ids += self.encode(run) if opens else self._encode_continued(run)
            if special:
                token = self._special_ids[special[0]]
                ids.append(token)
                start, opens = special.end(), token == self.bos_id
        return ids

    def _encode_continued(self, text: str) -> list[int]:
        """Ids of what a template wrote that goes on after other text: no space is put in front of it."""
        for before, before_ids in self._ids_of_anchors:
            ids = self._encode_rendered(before + text)
            if ids[: len(before_ids)] == before_ids:  # A token ends where the text begins: the others are its own.
                return ids[len(before_ids) :]
        return self._encode_rendered(text)

    @functools.cached_property
    def _ids_of_anchors(self) -> list[tuple[str, list[int]]]:
        return [(before, self.encode(before)) for before in (_ANCHORS if self._anchor[0] else ("",))]

    def decode(self, ids: Iterable[int], continues: bool = False) -> str:
        """The text of ids; specials appear by name, rows that pad the vocabulary as <id>.

        Args:
          ids: an array's or a list's.
          continues: they go on after others, so that a space at their beginning is one of the text.
        """
        text, run, opens = "", [], not continues
        for token in map(int, ids):
            if token < self.num_tokens and token not in self._specials:
                run.append(token)
                continue
            text += self._decode_run(run, opens) + self._specials.get(token, f"<{token}>")
            run, opens = [], token == self.bos_id
        return text + self._decode_run(run, opens)

    def _decode_run(self, ids: list[int], opens: bool) -> str:
        """The text of ids between specials; where they don't open a document, it keeps its first space."""
        before = [] if opens else self._anchor[1]
        return self._decode([*before, *ids]).removeprefix(self._decode(before)) if ids else ""

    @functools.cached_property
    def _anchor(self) -> tuple[str, list[int]]:
        """A word to put in front of a text that continues a document, and its ids.

        Both are empty where nothing is needed: the tokenizer neither puts a space in front of a text nor removes one.
        """
        a, space_a = self._encode(["a", " a"])
        return ("", []) if self._decode(a + a + space_a) == "aa a" else ("a", a)

    def _encode_all(self, texts: Sequence[str], encode: Callable[[list[str]], list[Encoded]]) -> list[Encoded]:
        """Cleans texts, cuts long ones, and has them encoded in batches of limited size."""
        encoded: list[Encoded] = []
        for batch in batches(map(clean, texts), _size, _MAX_BATCH):
            encoded += [self._encode_long(batch[0], encode)] if len(batch[0]) > MAX_CHUNK else encode(batch)
        return encoded

    def _encode_long(self, text: str, encode: Callable[[list[str]], list[Encoded]]) -> Encoded:
        """Encodes a text chunk by chunk, each but the first behind the anchor, whose ids are then taken off."""
        anchor, anchor_ids = self._anchor
        all_ids: list[int] = []
        all_offsets: list[np.ndarray] = []
        for start, stop in pairwise(cut(text, anywhere=not anchor)):
            before, skip = (anchor, len(anchor_ids)) if start else ("", 0)
            [(ids, offsets)] = encode([before + text[start:stop]])
            all_ids += ids[skip:]
            all_offsets.append(offsets[skip:] + (start - len(before)))
        return all_ids, np.concatenate(all_offsets)


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


def _of_given(text: str, offsets: np.ndarray) -> np.ndarray:
    """Offsets in `clean(text)` as offsets in `text`; none is empty."""
    pairs = [pair.start() - i for i, pair in enumerate(_SURROGATE_PAIR.finditer(text))]  # Each is one character.
    offsets[:, 1] = np.clip(offsets[:, 1], offsets[:, 0] + 1, len(text) - len(pairs))
    return offsets + np.searchsorted(pairs, offsets)


def cut(text: str, anywhere: bool) -> Iterator[int]:
    """The bounds of a text's chunks: 0, places in front of spaces between two words, and its end.

    Args:
      text: of any length.
      anywhere: a chunk has `MAX_CHUNK` characters at most, even if it is cut where there is no such space.
    """
    start = 0
    while len(text) - start > MAX_CHUNK:
        yield start
        stop = start + MAX_CHUNK
        space = _UP_TO_THE_LAST.match(text, start + 1, stop + 1)
        if space is None and not anywhere:
            space = _SPACE_BETWEEN_WORDS.search(text, stop)
            stop = len(text)
        start = space.end() - 1 if space else stop
    if start < len(text):
        yield start
    yield len(text)


def _size(text: str) -> int:
    return len(text) if len(text) <= MAX_CHUNK else _MAX_BATCH + 1  # What is to be cut is a batch by itself.


def batches(items: Iterable[_T], size: Callable[[_T], int], limit: int) -> Iterator[list[_T]]:
    """Consecutive items whose sizes sum to `limit` at most; one that is larger is a batch by itself."""
    batch: list[_T] = []
    total = 0
    for item in items:
        total += size(item)
        if batch and total > limit:
            yield batch
            batch, total = [], size(item)
        batch.append(item)
    if batch:
        yield batch
