"""The sources of documents by name, each with its train, validation and test split."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from meap_jax.config import SOURCES, ConfigError
from meap_jax.data.documents import Document
from meap_jax.data.retrieval import RetrievalSpec, generate
from meap_jax.data.stdlib import read_stdlib
from meap_jax.data.text import read_text

SPLITS = ("train", "validation", "test")


class Source(NamedTuple):
    """Documents of one kind; `documents(split)` can be called again and gives the same ones."""

    name: str
    documents: Callable[[str], Iterator[Document]]
    whole: bool  # documents are packed whole, never cut, and have answers


def open_source(name: str, options: Mapping[str, Any]) -> Source:
    """Opens a source.

    Args:
      name: stdlib, retrieval or text.
      options: those of `prepare`; a source reads its own.

    Raises:
      ConfigError: an unknown name, `text` without a path, or impossible retrieval counts.
      DataError: the text cannot be read.
    """
    if name == "retrieval":
        return _retrieval(dict(options["retrieval"]), options["seed"])
    if name == "stdlib":
        texts = read_stdlib()
        return _split_texts(name, lambda: texts, options["holdout"])
    if name == "text":
        path = options.get("path")
        if not path:
            raise ConfigError(
                "data.path is not set: name a folder of .txt or .jsonl files, such as --config.data.path=/data/books."
            )
        return _split_texts(name, lambda: read_text(path), options["holdout"])
    raise ConfigError(f"data.mixture names the source {name!r}, but there are {', '.join(SOURCES)}.")


def _retrieval(counts: dict[str, int], seed: int) -> Source:
    sizes = {"train": counts.pop("num_documents")}
    sizes["validation"] = sizes["test"] = counts.pop("num_eval_documents")
    num_eval_facts = counts.pop("num_eval_facts")
    train = RetrievalSpec(**counts)
    most = min(train.num_keys, train.num_values)
    if not 1 <= num_eval_facts <= most:
        raise ConfigError(f"data.retrieval.num_eval_facts is {num_eval_facts}, but must be from 1 to {most}.")
    held_out = dataclasses.replace(train, min_facts=None, num_facts=num_eval_facts, questions_per_fact=None)
    specs = {"train": train, "validation": held_out, "test": held_out}
    # With few keys and values equal documents turn up by chance: an earlier split keeps its own.
    order = ("test", "validation", "train")

    def documents(split: str) -> Iterator[Document]:
        earlier = {
            document.text
            for other in order[: order.index(split)]
            for document in generate(specs[other], (seed, SPLITS.index(other)), sizes[other])
        }
        for document in generate(specs[split], (seed, SPLITS.index(split)), sizes[split]):
            if document.text not in earlier:
                yield document

    return Source("retrieval", documents, whole=True)


def _split_texts(name: str, read: Callable[[], Iterable[str]], holdout: float) -> Source:
    """Splits by a hash of each text alone, so that equal texts never stand on both sides.

    In the order of their hashes, texts go to test, then to validation, until each holds the share
    `holdout` of all characters or a third of the texts; so fewer than three are all for training.
    """
    sizes = {_hash(text): len(text) for text in read()}
    splits = dict.fromkeys(sizes, "train")
    order = iter(sorted(sizes))
    for split in ("test", "validation"):
        room = holdout * sum(sizes.values())
        for text in islice(order, len(sizes) // 3):
            splits[text] = split
            room -= sizes[text]
            if room <= 0:
                break

    def documents(split: str) -> Iterator[Document]:
        return (Document((text,)) for text in read() if splits[_hash(text)] == split)

    return Source(name, documents, whole=False)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()[:12]
