"""Files of conversations for tests, and the flags of a tiny run that is fine-tuned on them."""

import json

import numpy as np

from tiny_runs import flags

WORDS = "the sea keeps a ship under sail while salt and storm and sand run over night day wind".split()


def alpaca(path, number=120, longest=90):
    """Writes instructions of random words with short and long answers, a record a line of an array."""
    rng = np.random.default_rng(0)

    def some(size):
        return " ".join(rng.choice(WORDS, size))

    records = [
        {"instruction": f"{i}: {some(4)}", "input": some(3) if i % 2 else "", "output": some(rng.integers(2, longest))}
        for i in range(number)
    ]
    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    return path


CHAT = {
    "data__mixture": "text=1", "data__sources__text__format": "chat", "sft__template": "alpaca", "seq_len": 200,
    "global_batch_size": 8, "num_epochs": 2, "eval__every": 0, "checkpoint__every": 0, "data__holdout": 0.1,
    "objective__mask_ratio": 0.1, "sft__arrangement": "shared_prefix", "eval__tasks": "validation",
}  # fmt: skip


def chat_flags(workdir, path, **overrides):
    """The flags of `python -m meap_jax.main` for a run on a file of conversations."""
    return flags(workdir, **{**CHAT, "data__path": path, **overrides})
