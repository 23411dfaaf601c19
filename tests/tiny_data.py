"""Small stores and blocks, made on the spot."""

import functools
import json
import signal
import subprocess
import sys
import time

import numpy as np

import tiny_runs
from meap_jax.config import add_source, base
from meap_jax.data import plans
from meap_jax.data.prepared import Blocks
from meap_jax.data.spec import data_spec
from meap_jax.data.store import EncodedDocument, Store, ids_dtype, merge_indices, write_shard
from meap_jax.fields import fields_of


def text_spec(path, more=None, **fields):
    """What a config asks for that reads one source of text with the tokenizer `mistral`, unless `fields` say otherwise.

    A field is given by its last name: of the source, of data.retrieval, of data, of the model, of the run or of sft.
    `more` is the path of a second source of text, called so.
    """
    c = base()
    if more is not None:
        add_source(c, "more", str(more))
    c.data.path = path and str(path)
    fields = dict(seq_len=96, mixture="text=1", tokenizer="mistral", holdout=0.1, max_skipped=10) | fields
    known = fields_of(["text"])
    for name, value in fields.items():
        groups = ("data.sources.text.", "data.retrieval.", "data.", "model.", "", "sft.")
        place = next(group + name for group in groups if group + name in known)
        c.update_from_flattened_dict({place: value})
    return data_spec(c)


def make_store(folder, shards, num_tokens=512):
    """A store of shards, each a list of (split, EncodedDocument)."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = ids_dtype(num_tokens)
    for i, documents in enumerate(shards):
        write_shard(folder, i, documents, dtype)
    merge_indices(folder, len(shards))
    return Store(folder, [len(documents) for documents in shards], dtype)


def blocks_of(folder, rows, spans, block_len):
    """Held-out blocks of one document each; `spans` are those of each row."""
    documents = [(1, EncodedDocument(list(map(int, ids)), tuple(own))) for ids, own in zip(rows, spans, strict=True)]
    store = make_store(folder, [documents])
    slices = np.array([(i, 0, len(ids)) for i, ids in enumerate(rows)], plans.SLICE_DTYPE)
    plan = plans.Plan(slices, np.arange(len(rows) + 1))
    return Blocks(store, plan, block_len, 0, is_one_segment=False)


def write_jsonl(path, texts):
    """A line a text."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def flip(path, start, stop):
    """Flips all bits of the bytes start ... stop - 1 of a file."""
    data = np.fromfile(path, np.uint8)
    data[start:stop] ^= 0xFF
    data.tofile(path)


def complete(folder):
    """The summaries of the shards that are there."""
    return list(folder.glob(".text.partial/?????.json"))


def start_program(path, body):
    """Starts a Python program that may use what is imported here and the repr of a spec, in a group of processes."""
    imports = (
        "import functools\nfrom meap_jax.corpus import beam, shards\nfrom meap_jax.corpus.prepare import prepare\n"
        "from meap_jax.data.spec import DataSpec, PlanSpec, SampleSpec, TextSourceSpec\n"
    )
    path.write_text(imports + body)
    # A shell's `&` has what it starts ignore SIGINT; the program is to be interrupted there too.
    heeds_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    options = dict(env=tiny_runs.environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    options["preexec_fn"] = heeds_interrupts
    return subprocess.Popen([sys.executable, str(path)], **options)


def wait_for(condition, process):
    """Until `condition()`, while the process runs; a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)


def write_sea_stories(folder, num_files, texts_a_file, num_words):
    """Files {i:02}.jsonl of random words, every text of which is its own."""
    words = np.array("the sea salt ship storm sail sand keeps under over while night day wind no".split())
    rng = np.random.default_rng(0)
    for i in range(num_files):
        texts = (f"{i}-{j} " + " ".join(rng.choice(words, num_words)) for j in range(texts_a_file))
        write_jsonl(folder / f"{i:02}.jsonl", texts)
    return folder
