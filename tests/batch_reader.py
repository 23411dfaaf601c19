"""One of several processes that read the batches of a run, as a program.

python batch_reader.py TASK.json OUT.json: joins the others, goes on from the iterator's state in the task, reads some
steps, and writes the rows that its devices hold, as {step: {row: SHA-256 of the row's arrays}}, and its last state.
"""

import hashlib
import json
import pathlib
import sys

from meap_jax import sharding
from meap_jax.data.pipeline import TrainBatches
from meap_jax.data.prepare import prepare
from meap_jax.hosts import join_hosts


def main(task_file, out_file):
    """See above."""
    join_hosts()
    task = json.loads(pathlib.Path(task_file).read_text())
    mesh = sharding.make_mesh(task["mesh"])
    batches = TrainBatches(
        prepare(task["folder"], task["options"]),
        task["weights"],
        seed=task["seed"],
        batch_size=task["batch_size"],
        sharding=sharding.batch_sharding(mesh),
    )
    if task["state"] is not None:
        batches.set_state(task["state"])
    seen = {}
    for step in range(task["start"], task["stop"]):
        rows = {}
        for name, array in sorted(next(batches).items()):
            for shard in array.addressable_shards:
                first = shard.index[0].indices(array.shape[0])[0]
                for i, row in enumerate(shard.data):
                    rows.setdefault(first + i, {})[name] = bytes(memoryview(row.__array__()))
        seen[step] = {row: hashlib.sha256(b"".join(arrays.values())).hexdigest() for row, arrays in rows.items()}
    pathlib.Path(out_file).write_text(json.dumps({"seen": seen, "state": batches.get_state()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
