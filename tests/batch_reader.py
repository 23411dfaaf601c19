"""One of several processes that read the batches of a run, as a program.

python batch_reader.py TASK.pickle OUT.json: joins the others; for each packing of the task goes on from the iterator's
state, reads some steps, and writes what its devices hold, as {packing: {step: {row: SHA-256}}}, and the last states.
"""

import hashlib
import json
import pathlib
import pickle
import sys

import jax
import numpy as np

from meap_jax import sharding
from meap_jax.corpus.prepare import prepare
from meap_jax.data.pipeline import TrainBatches
from meap_jax.hosts import join_hosts


def main(task_file, out_file):
    """See above."""
    join_hosts()
    task = pickle.loads(pathlib.Path(task_file).read_bytes())
    mesh = sharding.make_mesh(task["mesh"])
    seen, states, fields = {}, {}, {name: task[name] for name in ("weights", "seed", "batch_size")}
    for packing, spec in task["specs"].items():
        batches = TrainBatches(prepare(task["folder"], spec), sharding=sharding.batch_sharding(mesh), **fields)
        if task["states"] is not None:
            batches.set_state(task["states"][packing])
        seen[packing] = {step: hashes(next(batches)) for step in range(task["start"], task["stop"])}
        states[packing] = batches.get_state()
    pathlib.Path(out_file).write_text(json.dumps({"seen": seen, "states": states}))


def hashes(batch):
    """{row: SHA-256 of its arrays} of the rows that this process's devices hold."""
    rows = {}
    for array in jax.tree.leaves(batch):
        for shard in array.addressable_shards:
            first = shard.index[0].indices(array.shape[0])[0]
            for i, row in enumerate(np.asarray(shard.data)):
                rows[first + i] = rows.get(first + i, b"") + row.tobytes()
    return {row: hashlib.sha256(content).hexdigest() for row, content in rows.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
