"""How fast corpora are tokenized and prepared ones read, against the `datasets` package, and in how much memory.

python -m experiments.benchmarks.corpus [--no-datasets] [--documents=N] [--repeats=N] [--quick] [--json=FILE]
pip install -r requirements-parity.txt   # datasets among others, before the first comparison

All on one core. Tokenizing goes from a .jsonl of the standard library's text to ids on disk, with one BPE for both:
ours is a shard as `meap_jax.corpus.prepare` makes it, theirs `load_dataset("json")` and a batched `map`.

Reading goes from tokenized documents on disk to shuffled blocks of 4,097 ids as numpy arrays, in batches of 8. Ours is
the sequence that training reads, which puts blocks together as they are asked for. Theirs is twice: streaming, where a
batched `map` cuts documents into blocks on the way and a buffer of 1,000 shuffles them; and the way of the examples of
`transformers`, where that map has run before and its blocks are on disk, with an exact shuffle.

Memory is the resident size of a process that tokenizes and packs a simulated source, after a tenth of its documents and
after all of them.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import harness
from experiments.benchmarks.timing import Ratio, interleave, timed
from meap_jax import tokenizers
from meap_jax.config import base
from meap_jax.corpus import packing, shards
from meap_jax.corpus.documents import Document
from meap_jax.corpus.prepare import prepare
from meap_jax.corpus.sources import open_source
from meap_jax.corpus.stdlib import read_stdlib
from meap_jax.data import plans
from meap_jax.data.manifest import write_manifest
from meap_jax.data.pipeline import global_sequence
from meap_jax.data.prepared import Blocks, Prepared, open_store, plan_folder
from meap_jax.data.spec import DataSpec, data_spec
from meap_jax.data.store import merge_indices
from meap_jax.errors import ConfigError
from meap_jax.readers import Part, Skips

SEQ_LEN, BATCH_SIZE, BUFFER = 4096, 8, 1_000
COPIES = 12  # Of the standard library's two million characters.
DOCUMENTS = 10_000_000


def measure(args: argparse.Namespace) -> list[harness.Table]:
    """The tables of this benchmark."""
    if not args.no_datasets and importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            "the package datasets is not installed here: pip install -r requirements-parity.txt, or give --no-datasets "
            "for our side alone."
        )
    with tempfile.TemporaryDirectory() as name, one_core():
        folder = Path(name)
        file = write_corpus(folder / "corpus.jsonl", 1 if args.quick else COPIES)
        bpe = tokenizers.train_bpe(read_stdlib()[:100], 8_192)
        (folder / "bpe").mkdir()
        for filename, content in bpe.files().items():
            (folder / "bpe" / filename).write_bytes(content)
        tables = [tokenizing(folder, file, args), reading(folder, file, args)]
    documents = 2_000 if args.quick else args.documents
    return [*tables, memory(documents)]


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keeps this process, its threads and those that it starts, to one core."""
    cores = os.sched_getaffinity(0)
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.sched_setaffinity(0, {min(cores)})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def write_corpus(file: Path, copies: int) -> Path:
    """The standard library's text some times over, no text of which is another's; a line a document."""
    texts = read_stdlib()
    with file.open("w") as lines:
        for copy in range(copies):
            lines.writelines(json.dumps({"text": f"{copy} {text}"}) + "\n" for text in texts)
    return file


def _spec(path: str | None = None) -> DataSpec:
    """One source of text, in Mistral's pieces."""
    c = base()
    c.seq_len, c.model.vocab_size = SEQ_LEN, 2**17
    c.data.update(dict(mixture="text=1", tokenizer="mistral", holdout=0.005, max_skipped=0))
    if path is not None:
        c.data.path = path
    return data_spec(c)


# ---------------------------------------------------------------------------------------------------------- tokenizing


def tokenizing(folder: Path, file: Path, args: argparse.Namespace) -> harness.Table:
    """From text to ids on disk."""
    source = open_source("text", _spec(str(file)).sources["text"])
    out = folder / "tokenized"
    out.mkdir()

    def ours() -> None:
        [job] = shards.jobs(source, out, folder / "bpe", 0)
        shards.make_shard(job)
        for path in out.iterdir():
            path.unlink()

    turns: dict[str, Callable[[], float]] = {"ours": timed(ours)}
    if not args.no_datasets:
        turns["theirs"] = timed(_Datasets(folder, BATCH_SIZE, 0).tokenize(file))
    [job] = shards.jobs(source, out, folder / "bpe", 0)
    tokens = shards.make_shard(job)["tokens"]
    timings = interleave(turns, rounds=args.repeats)
    row = {
        "text": f"{file.stat().st_size / 1e6:.0f} MB .jsonl",
        "ours / datasets, tokens/s": None if args.no_datasets else timings.ratio("theirs", "ours"),
        "ours, tokens/s": tokens / timings.median("ours"),
        "ours, MB/s": file.stat().st_size / 1e6 / timings.median("ours"),
    }
    return harness.Table("Tokenizing on one core", [row])


# ------------------------------------------------------------------------------------------------------------- reading


def reading(folder: Path, file: Path, args: argparse.Namespace) -> harness.Table:
    """From tokenized documents to batches of blocks."""
    prepared = prepare(folder / "prepared", _spec(str(file)), workers=1)
    num_batches = len(prepared.blocks("text", "train")) // BATCH_SIZE
    turns = {"ours": timed(lambda: _read_ours(prepared, num_batches))}
    rows = ["blocks cut on the way", "blocks cut before"]
    if not args.no_datasets:
        theirs = _Datasets(folder, BATCH_SIZE, num_batches)
        theirs.write_documents(prepared)
        turns |= {rows[0]: timed(theirs.stream), rows[1]: timed(theirs.read_blocks)}
    timings = interleave(turns, rounds=args.repeats)
    tokens_a_second = num_batches * BATCH_SIZE * (SEQ_LEN + 1) / timings.median("ours")

    def against(name: str) -> Ratio | None:
        return None if args.no_datasets else timings.ratio(name, "ours")

    return harness.Table(
        f"Reading blocks of {SEQ_LEN + 1} ids on one core",
        [
            {"datasets with": name, "ours / datasets, tokens/s": against(name), "ours, tokens/s": tokens_a_second}
            for name in rows
        ],
    )


def _read_ours(prepared: Prepared, num_batches: int) -> None:
    sequence = global_sequence(prepared, {"text": 1.0}, 0)
    for step in range(num_batches):
        np.stack([sequence[step * BATCH_SIZE + row].tokens for row in range(BATCH_SIZE)])


class _Datasets:
    """The same work by the package `datasets`."""

    def __init__(self, folder: Path, batch_size: int, num_batches: int):
        os.environ["HF_HUB_OFFLINE"] = "1"
        import datasets

        datasets.disable_progress_bars()
        self._datasets, self._folder = datasets, folder
        self._batch_size, self._num_batches = batch_size, num_batches

    def tokenize(self, file: Path) -> Callable[[], None]:
        """A function that tokenizes a .jsonl into a dataset on disk, anew each time."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._folder / "bpe" / "tokenizer.json"))

        def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            return {"input_ids": [encoding.ids for encoding in tokenizer.encode_batch(batch["text"])]}

        def run() -> None:
            with tempfile.TemporaryDirectory(dir=self._folder) as cache:
                data = self._datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=cache)
                data.map(encode, batched=True, remove_columns=["text"], load_from_cache_file=False)

        return run

    def write_documents(self, prepared: Prepared) -> None:
        """The training documents of a prepared source, and the blocks that they make, as datasets on disk."""
        store = open_store(prepared.folder / "text")
        documents = [{"input_ids": ids.astype(np.int32)} for ids in store.read(store.documents("train"))]
        data = self._datasets.Dataset.from_list(documents)
        data.to_parquet(str(self._folder / "documents.parquet"))
        data.map(_grouped, batched=True).save_to_disk(str(self._folder / "blocks"))

    def stream(self) -> None:
        """Documents are read one after the other, cut into blocks and shuffled in a buffer."""
        path = str(self._folder / "documents.parquet")
        data = self._datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
        self._take(data.map(_grouped, batched=True).shuffle(seed=0, buffer_size=BUFFER).with_format("numpy"))

    def read_blocks(self) -> None:
        """Blocks that were cut before, in an order that was drawn before."""
        data = self._datasets.load_from_disk(str(self._folder / "blocks")).shuffle(seed=0)
        self._take(data.with_format("numpy"))

    def _take(self, data: Any) -> None:
        for _, batch in zip(range(self._num_batches), data.iter(batch_size=self._batch_size), strict=False):
            np.asarray(batch["input_ids"])


def _grouped(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Documents as one stream, cut into blocks; as the examples of transformers do it, a batch's rest is lost."""
    stream = list(chain.from_iterable(batch["input_ids"]))
    length = SEQ_LEN + 1
    return {"input_ids": [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]}


# -------------------------------------------------------------------------------------------------------------- memory


class Simulated:
    """A source of short texts that are made up as they are read, in parts of 100,000."""

    PART = 100_000

    def __init__(self, num_documents: int):
        self._num_documents = num_documents

    def parts(self) -> list[Part]:
        """See `meap_jax.corpus.sources.Source`."""
        starts = range(0, self._num_documents, self.PART)
        return [Part("simulated", i, min(i + self.PART, self._num_documents), 2**30) for i in starts]

    def read(self, part: Part, skips: Skips) -> Iterator[tuple[int, Document]]:
        """See `meap_jax.corpus.sources.Source`."""
        for i in range(part.start, part.stop or 0):
            yield int(i % 1000 == 0), Document(f"Number {i} is followed by {i + 1} and has {len(str(i))} digits.")


def memory(num_documents: int) -> harness.Table:
    """Of a process of its own, so that nothing else has been there before."""
    program = [sys.executable, "-m", "experiments.benchmarks.corpus", f"--simulate={num_documents}"]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True)
    return harness.Table("Memory of preparing a simulated source", json.loads(done.stdout))


def simulate(num_documents: int) -> list[dict[str, Any]]:
    """Tokenizes and packs it here; a row a stage."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for filename, content in tokenizers.make("mistral").files().items():
            (folder / filename).write_bytes(content)
        store = folder / "simulated"
        store.mkdir()
        planned = shards.jobs(Simulated(num_documents), store, folder, 0)
        sizes, summaries = [], []
        for job in planned:
            summaries.append(shards.make_shard(job))
            sizes.append(_resident())
        merge_indices(store, len(planned))
        kept = [{key: s[key] for key in ("documents", "tokens", "bytes")} for s in summaries]
        write_manifest(store, {"num_tokens": 32_001, "shards": kept, "files": {}})
        spec = _spec()
        packing.make_plans(store, spec.plans["text"], spec.sources["text"])
        packed = _resident()
        plan = plans.load(plan_folder(store, spec.plans["text"]), "train")
        blocks = Blocks(open_store(store), plan, SEQ_LEN + 1, 0, is_one_segment=True)
        for i in np.random.default_rng(0).integers(0, len(blocks), 2_000):
            blocks[int(i)]
        tenth = max(1, len(planned) // 10)
        done = [sum(s["documents"] for s in summaries[:n]) for n in (tenth, len(planned))]
        return [
            {"after": f"tokenizing {done[0]:,} documents", "resident MB": sizes[tenth - 1]},
            {"after": f"tokenizing {done[1]:,}", "resident MB": sizes[-1]},
            {"after": f"packing them into {len(blocks):,} blocks", "resident MB": packed},
            {"after": "reading 2,000 of these", "resident MB": _resident()},
        ]


def _resident() -> float:
    """MB of this process that are no pages of files."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1e3 for line in status.splitlines() if line.startswith("RssAnon:"))


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-datasets", action="store_true", help="measure our side alone")
    parser.add_argument(
        "--documents", type=int, default=DOCUMENTS, help="of the simulated source (default %(default)s)"
    )
    parser.add_argument("--simulate", type=int, help=argparse.SUPPRESS)  # How this module starts itself.


command = harness.main("corpus", __doc__, measure, repeats=5, add_flags=_add_flags)

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("--simulate="):
        print(json.dumps(simulate(int(sys.argv[1].partition("=")[2]))))
    else:
        harness.run(command)
