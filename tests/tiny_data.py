"""Small stores and blocks, made on the spot."""

import json

import numpy as np

from meap_jax.data import plans
from meap_jax.data.prepared import Blocks
from meap_jax.data.store import EncodedDocument, Store, ids_dtype, merge_indices, write_shard

PLAN = {"max_tokens": 0, "long_from": 0, "keep_shorter": 1.0, "packing": "concat", "seq_len": 96, "seed": 0}


def text_options(path, **changes):
    """What `config.data_options` gives for one source of text in mistral's pieces; changes as sources__field."""
    text = {"kind": "text", "path": path and str(path), "validation": "", "field": "text", "where": "", "holdout": 0.1}
    options = {
        "tokenizer": "mistral",
        "vocab_size": 32_064,
        "sources": {"text": text},
        "plans": {"text": dict(PLAN)},
        "max_skipped": 10,
    }
    for name, value in changes.items():
        group, _, field = name.partition("__")
        if field:
            options[group]["text"][field] = value
        else:
            options[name] = value
    return options


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
