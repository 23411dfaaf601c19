"""One of several processes that read the batches of a run, as a program.

python batch_reader.py TASK.json OUT.json: joins the others; for each packing of the task goes on from the iterator's
state, reads some steps, and writes what its devices hold, as {packing: {step: {row: SHA-256}}}, and the last states.
"""

import hashlib
import json
import pathlib
import sys

import numpy as np

from meap_jax import sharding
from meap_jax.config import add_source, base
from meap_jax.corpus.prepare import prepare
from meap_jax.data.pipeline import TrainBatches
from meap_jax.data.spec import data_spec
from meap_jax.hosts import join_hosts


def main(task_file, out_file):
    """See above."""
    join_hosts()
    task = json.loads(pathlib.Path(task_file).read_text())
    mesh = sharding.make_mesh(task["mesh"])
    seen, states = {}, {}
    for packing in task["packings"]:
        batches = TrainBatches(
            prepare(task["folder"], spec_of(task, packing)),
            task["weights"],
            seed=task["seed"],
            batch_size=task["batch_size"],
            sharding=sharding.batch_sharding(mesh),
        )
        if task["states"] is not None:
            batches.set_state(task["states"][packing])
        seen[packing] = {step: hashes(next(batches)) for step in range(task["start"], task["stop"])}
        states[packing] = batches.get_state()
    pathlib.Path(out_file).write_text(json.dumps({"seen": seen, "states": states}))


def spec_of(task, packing):
    """The data of a task, packed in one way."""
    c = base()
    c.seq_len, c.model.vocab_size = 32, 32_064
    c.data.update(dict(mixture=",".join(task["paths"]), tokenizer="mistral", holdout=0.1, packing=packing))
    c.data.path = task["paths"]["text"]
    add_source(c, "more", task["paths"]["more"])
    return data_spec(c)


def hashes(batch):
    """{row: SHA-256 of its arrays} of the rows that this process's devices hold."""
    rows = {}
    for _, array in sorted(batch.items()):
        for shard in array.addressable_shards:
            first = shard.index[0].indices(array.shape[0])[0]
            for i, row in enumerate(np.asarray(shard.data)):
                rows[first + i] = rows.get(first + i, b"") + row.tobytes()
    return {row: hashlib.sha256(content).hexdigest() for row, content in rows.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
