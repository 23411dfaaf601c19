"""Damages the newest checkpoint of a run again and again and restores each time: python restorer.py TASK FLAGS.

TASK is a JSON list of damages, {"how": ..., "file": ..., "seed": ...} with how from DAMAGES and a file of the
checkpoint, "every" for each in turn, or null for one that is drawn. Writes a JSON line for each: what was damaged, and
the outcome:

  same       the newest checkpoint, every bit of it: what was damaged doesn't matter
  older      the one before, every bit of it
  sentence   a ConfigError
  wrong      another state, which must never be
  traceback  another error, which must never be
"""

import json
import pathlib
import shutil
import sys

import jax
import numpy as np

from meap_jax import cli, restore
from meap_jax.checkpoint import Checkpointer, Keep
from meap_jax.errors import UserError
from meap_jax.run import open_run
from meap_jax.train import abstract_inputs


def flip(file, older, rng):
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes(content)


def truncate(file, older, rng):
    content = file.read_bytes()
    file.write_bytes(content[: rng.integers(len(content))])


def delete(file, older, rng):
    file.unlink()


def zero(file, older, rng):
    file.write_bytes(bytes(file.stat().st_size))


def swap(file, older, rng):
    """Takes the file of the checkpoint before, which is whole, too."""
    shutil.copy(older, file)


DAMAGES = {function.__name__: function for function in (flip, truncate, delete, zero, swap)}


class Restorer:
    """A run whose newest two checkpoints are known."""

    def __init__(self, words):
        self._config, self._workdir = cli.parse_config(["restorer", *words])
        self.folder = pathlib.Path(self._workdir) / "checkpoints"
        self._aside = self.folder.parent / "aside"
        self.older, self.newest = sorted(self.folder.iterdir(), key=lambda path: int(path.name))
        self._known = {int(self.newest.name): self._state()}
        shutil.copytree(self.newest, self._aside)
        shutil.rmtree(self.newest)
        self._known[int(self.older.name)] = self._state()
        self.repair()

    def _state(self):
        """(step, every bit of the state, the position in the data) that a run would start from."""
        run = open_run(self._config, self._workdir)
        checkpointer = Checkpointer(self._workdir, Keep(newest=2))
        try:
            found = checkpointer.restore(abstract_inputs(run.config, run.definition, run.mesh)[0])
        finally:
            checkpointer.close()
        leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(found.state)]
        return found.step, leaves, json.dumps(found.meta["data"], sort_keys=True)

    def repair(self):
        """Puts the newest checkpoint back as it was."""
        shutil.rmtree(self.newest, ignore_errors=True)
        shutil.copytree(self._aside, self.newest)
        shutil.rmtree(self.folder.parent / "damaged_checkpoints", ignore_errors=True)

    def files(self):
        """Of the newest checkpoint, without those that are empty."""
        found = (path for path in self._aside.rglob("*") if path.is_file() and path.stat().st_size)
        return sorted(path.relative_to(self._aside).as_posix() for path in found)

    def outcome(self):
        """What a start makes of the checkpoints as they are now."""
        try:
            found = self._state()
        except UserError as error:
            return "sentence", str(error)
        except Exception as error:
            return "traceback", f"{type(error).__name__}: {error}"
        if found != self._known.get(found[0]):
            return "wrong", f"step {found[0]}"
        return ("same" if found[0] == int(self.newest.name) else "older"), f"step {found[0]}"


def main(task, *words):
    cli.use_compile_cache()
    restore.SECONDS_BETWEEN_READS = 0.0
    restorer = Restorer(words)
    files = restorer.files()
    for damage in json.loads(task):
        rng = np.random.default_rng(damage["seed"])
        chosen = files if damage["file"] == "every" else [damage["file"] or str(rng.choice(files))]
        for name in chosen:
            older = restorer.older / name
            if damage["how"] == "swap" and not older.exists():
                continue  # Files of arrays are named at random.
            DAMAGES[damage["how"]](restorer.newest / name, older, rng)
            outcome, said = restorer.outcome()
            print(json.dumps(dict(how=damage["how"], file=name, outcome=outcome, said=said)), flush=True)
            restorer.repair()


if __name__ == "__main__":
    main(*sys.argv[1:])
