"""Where documents come from: each source in parts that can be read on their own, each document with its split.

A kind of source of one's own is a class with the two methods of `Source`, and an entry of `SOURCES`:

    SOURCES["counting"] = lambda name, spec: Counting(int(spec.path.removeprefix("counting:")))

makes `--config.data.path=counting:500` work in every command of the Python process that has run this line.
"""

import contextlib
import dataclasses
import hashlib
import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from meap_jax.corpus.documents import ChatDocument, Document
from meap_jax.corpus.retrieval import RetrievalSpec, generate
from meap_jax.corpus.stdlib import read_stdlib
from meap_jax.data.manifest import MANIFEST, read_manifest
from meap_jax.data.spec import ChatSourceSpec, RetrievalSourceSpec, SourceSpec, StdlibSourceSpec, TextSourceSpec
from meap_jax.data.store import SPLITS, EncodedDocument, Store, TokenSpan, ids_dtype
from meap_jax.errors import ConfigError, DataError
from meap_jax.fields import SOURCE_FIELDS
from meap_jax.paths import is_url
from meap_jax.readers import ConversationCorpus, Corpus, Part, Skips, open_conversations, open_corpus

TRAIN, VALIDATION, TEST = range(len(SPLITS))


class Source(Protocol):
    """Documents of one kind. Sources are sent to worker processes, and so are small and picklable."""

    def parts(self) -> Sequence[Part]:
        """What it consists of, in an order that doesn't depend on the machine."""

    def read(self, part: Part, skips: Skips) -> Iterator[tuple[int, Document | ChatDocument | EncodedDocument]]:
        """The documents of a part in order, each behind the number of its split in `SPLITS`; bad ones go to `skips`."""


def open_source(name: str, spec: SourceSpec, template: str = "") -> Source:
    """Opens a source.

    Args:
      name: of the source, for messages.
      spec: what it holds.
      template: in Jinja, of a source of conversations.

    Raises:
      ConfigError: a path that names nothing.
      DataError: there is no text.
    """
    if isinstance(spec, RetrievalSourceSpec):
        return Retrieval(spec)
    if isinstance(spec, StdlibSourceSpec):
        return StandardLibrary(spec.holdout)
    assert spec.path is not None, "prepare refuses a source without a path that isn't prepared"
    scheme = "" if is_url(spec.path) else spec.path.partition(":")[0]
    if scheme not in SOURCES and isinstance(spec, ChatSourceSpec):
        return _chat(name, spec, template)
    return SOURCES.get(scheme, _text)(name, spec)


@dataclasses.dataclass(frozen=True)
class Text:
    """A corpus of texts, and perhaps a second one that is held out.

    A text's split depends on a hash of it alone, so that equal texts share a split, and added texts move none.
    """

    name: str
    corpora: tuple[Corpus, ...]
    holdout: float  # Share in each of validation and test, if there is no second corpus.

    def parts(self) -> list[Part]:
        """Those of the first corpus, then those of the second."""
        return _parts(self.name, self.corpora)

    def read(self, part: Part, skips: Skips) -> Iterator[tuple[int, Document]]:
        """See `Source`."""
        for text in self.corpora[part.is_held_out].read(part, skips):
            yield _split_in(part, len(self.corpora), text, self.holdout), Document(text)


@dataclasses.dataclass(frozen=True)
class Chat:
    """Conversations, and perhaps a second corpus of them that is held out.

    As with `Text`, equal conversations share a split: where each turn is a conversation, equal turns do. The system
    prompt that the config gives to those without one moves none.
    """

    name: str
    corpora: tuple[ConversationCorpus, ...]
    holdout: float
    template: str  # In Jinja.
    system: str | None  # Of conversations that have none.
    each_turn: bool  # Is a conversation by itself.

    def parts(self) -> list[Part]:
        """Those of the first corpus, then those of the second."""
        return _parts(self.name, self.corpora)

    def read(self, part: Part, skips: Skips) -> Iterator[tuple[int, ChatDocument]]:
        """See `Source`."""
        for whole in self.corpora[part.is_held_out].read(part, skips):
            for conversation in whole.turns if self.each_turn else (whole,):
                messages = conversation.messages
                said = json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)
                split = _split_in(part, len(self.corpora), said, self.holdout)
                if self.system is not None and messages[0]["role"] != "system":
                    messages = ({"role": "system", "content": self.system}, *messages)
                yield split, ChatDocument(conversation._replace(messages=messages), self.template)


@dataclasses.dataclass(frozen=True)
class StandardLibrary:
    """The documentation of the running Python, `meap_jax.corpus.stdlib`."""

    holdout: float

    def parts(self) -> list[Part]:
        """One."""
        return [Part("stdlib")]

    def read(self, part: Part, skips: Skips) -> Iterator[tuple[int, Document]]:
        """See `Source`."""
        return ((_split(text, self.holdout), Document(text)) for text in read_stdlib())


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Generated documents that state facts and ask for them, `meap_jax.corpus.retrieval`."""

    spec: RetrievalSourceSpec

    def parts(self) -> list[Part]:
        """One a split."""
        return [Part(f"retrieval:{split}") for split in SPLITS]

    def read(self, part: Part, skips: Skips) -> Iterator[tuple[int, Document]]:
        """See `Source`."""
        # With few keys and values equal documents turn up by chance: an earlier split keeps its own.
        order = ("test", "validation", "train")
        split = part.path.partition(":")[2]
        earlier = {document.text for other in order[: order.index(split)] for document in self._generate(other)}
        for document in self._generate(split):
            if document.text not in earlier:
                yield SPLITS.index(split), document

    def _generate(self, split: str) -> Iterator[Document]:
        source = self.spec
        names = {field.name for field in dataclasses.fields(RetrievalSpec)} - {"min_fillers"}  # 0 in training.
        spec = RetrievalSpec(**{name: getattr(source, name) for name in names})
        if split != "train":
            spec = dataclasses.replace(spec, min_facts=None, num_facts=source.num_eval_facts, questions_per_fact=None)
        num_documents = source.num_documents if split == "train" else source.num_eval_documents
        return generate(spec, (source.seed, SPLITS.index(split)), num_documents)


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """A source that was prepared elsewhere: its folder in a prepared folder. Splits and spans stay what they are there.

    Documents with ids beyond the vocabulary are bad records, and so are those that can't be read.
    """

    folder: str

    def __post_init__(self) -> None:
        manifest = self.manifest if Path(self.folder, MANIFEST).is_file() else {}
        if "shards" not in manifest:
            raise ConfigError(
                f"prepared:{self.folder} names no prepared source: name the folder of one in it, such as "
                f"prepared:{self.folder.rstrip('/')}/text."
            )
        if manifest["options"]["kind"] == "retrieval":
            raise ConfigError(f"prepared:{self.folder} holds retrieval documents, which are generated, not copied.")

    @property
    def manifest(self) -> dict[str, Any]:
        """Of the source."""
        return read_manifest(Path(self.folder))

    @property
    def tokenizer_hash(self) -> str:
        """Of the tokenizer that made the ids."""
        return self.manifest["tokenizer"]

    def parts(self) -> list[Part]:
        """Its shards."""
        shards = self.manifest["shards"]
        starts = np.cumsum([0] + [shard["documents"] for shard in shards]).tolist()
        return [
            Part(self.folder, start, stop, shard["bytes"])
            for start, stop, shard in zip(starts[:-1], starts[1:], shards, strict=True)
        ]

    def read(self, part: Part, skips: Skips) -> Iterator[tuple[int, EncodedDocument]]:
        """See `Source`."""
        manifest = self.manifest
        num_tokens = manifest["num_tokens"]
        store = Store(Path(self.folder), [s["documents"] for s in manifest["shards"]], ids_dtype(num_tokens))
        documents = range(part.start, len(store) if part.stop is None else part.stop)
        spans = _spans(store, documents)
        for document in documents:
            try:
                ids = store[document]
            except DataError as error:
                skips.add("can't be read", str(error).partition(" (")[0])
                continue
            if ids.max(initial=0) >= num_tokens:
                place = f"{self.folder}, document {document}"
                skips.add(f"has an id beyond the vocabulary of {num_tokens}", place)
                continue
            yield int(store.index["split"][document]), EncodedDocument(ids.tolist(), tuple(spans.get(document, ())))


def _spans(store: Store, documents: range) -> Mapping[int, list[TokenSpan]]:
    """The spans of consecutive documents, by document; those without spans are left out."""
    found = defaultdict[int, list[TokenSpan]](list)
    for role in store.roles():
        spans = store.spans(role)
        first, stop = (bisect_left(spans, end, key=itemgetter("document")) for end in (documents.start, documents.stop))
        names = [name for name, *_ in spans.dtype.descr[3:]]  # Of columns, behind document, start and length.
        for document, start, length, *columns in spans[first:stop].tolist():
            found[document].append(TokenSpan(start, length, role, dict(zip(names, columns, strict=True))))
    return found


def _parts(name: str, corpora: Sequence[Corpus | ConversationCorpus]) -> list[Part]:
    with _naming(name):
        return [part._replace(is_held_out=i > 0) for i, corpus in enumerate(corpora) for part in corpus.parts()]


def _text(name: str, spec: TextSourceSpec) -> Text:
    paths = filter(None, (spec.path, spec.validation))
    with _naming(name):
        return Text(name, tuple(open_corpus(path, field=spec.field, where=spec.where) for path in paths), spec.holdout)


def _chat(name: str, spec: ChatSourceSpec, template: str) -> Chat:
    paths = filter(None, (spec.path, spec.validation))
    with _naming(name):
        corpora = tuple(open_conversations(path, where=spec.where) for path in paths)
    return Chat(name, corpora, spec.holdout, template, spec.system, spec.turns == "each")


def _token_ids(name: str, spec: TextSourceSpec) -> TokenIds:
    for field in ("validation", "field", "where"):
        value = getattr(spec, field)
        if value != SOURCE_FIELDS[field].default:
            raise ConfigError(
                f"data.sources.{name}.{field} is {value!r}, but its path is {spec.path!r}, whose splits and "
                "documents stay what they are: leave it out."
            )
    source = TokenIds(str(spec.path).removeprefix("prepared:"))
    if isinstance(spec, ChatSourceSpec):
        options = source.manifest["options"]
        if options["kind"] != "chat":
            raise ConfigError(
                f"data.sources.{name}.format is 'chat', but {spec.path} holds no conversations: set it to text."
            )
        for field in ("template", "system", "turns"):
            if (wanted := getattr(spec, field)) != options[field]:
                raise ConfigError(
                    f"sft.{field} is {wanted!r}, but {spec.path} was prepared with {options[field]!r}, and its "
                    "conversations stay what they are: set that, or name the files that they came from."
                )
    return source


# What opens a source whose path begins with this word and a colon; every other path is read as text or conversations.
SOURCES: dict[str, Callable[[str, TextSourceSpec], Source]] = {"prepared": _token_ids}


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the source's name in front of errors about its path, field or where."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"data.sources.{name}: {error}") from error


def _split_in(part: Part, num_corpora: int, text: str, holdout: float) -> int:
    """The split of a text: of one corpus a share is held out, of two the second."""
    if part.is_held_out:
        return VALIDATION if _fraction(text) < 0.5 else TEST
    return TRAIN if num_corpora > 1 else _split(text, holdout)


def _split(text: str, holdout: float) -> int:
    fraction = _fraction(text)
    return VALIDATION if fraction < holdout else TEST if fraction < 2 * holdout else TRAIN


def _fraction(text: str) -> float:
    """A number in [0, 1) that looks random and depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:7], "big") / 2**56
