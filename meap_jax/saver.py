"""Saves the states of a run, with all that it needs to go on, and goes back to them."""

from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from meap_jax.checkpoint import Checkpointer
from meap_jax.data.pipeline import TrainBatches
from meap_jax.export import export_stored
from meap_jax.metrics import local_folder
from meap_jax.model.decoder import Params
from meap_jax.models import held_model
from meap_jax.numerics import Monitor
from meap_jax.run import Run
from meap_jax.start import Start, start
from meap_jax.train import TrainState

EXPORT_FOLDER = "export"  # In the workdir.


class RunSaver:
    """The `Saver` of `meap_jax.loop` for one run."""

    def __init__(self, run: Run, checkpointer: Checkpointer, batches: TrainBatches, began: Start, monitor: Monitor):
        self._run, self._checkpointer, self._batches, self._monitor = run, checkpointer, batches, monitor
        self._origin = began.origin
        self._batches_ahead = self._next_batch() - began.step

    def save(self, step: int, state: TrainState, loss: float | None = None) -> None:
        """Saves a state, and the model for transformers if the config says so."""
        meta = {
            "config": self._run.config.to_dict(),
            "fingerprint": self._run.prepared.fingerprint,
            "tokenizer": self._run.prepared.tokenizer_hash,
            "data": self._batches.get_state(),
            "origin": self._origin,
            "monitor": self._monitor.get_state(),
        }
        self._checkpointer.save(step, state, meta, loss)
        if self._run.config.checkpoint.export != "none":
            write_for_hub(self._run, step, state.params, self._origin)

    def is_to_save_again(self) -> bool:
        """Whether the last save failed in the background, and the state of now is to be saved in its place."""
        return self._checkpointer.is_to_save_again()

    def finish(self) -> bool:
        """Waits for the last save; returns whether it is there, and needn't be repeated."""
        return self._checkpointer.finish()

    def go_back(self) -> tuple[int, TrainState, dict[str, Any]]:
        """Returns the newest state that was saved or that of the beginning, its step, and the monitor's state then.

        Data goes on behind what was read.
        """
        with jax.transfer_guard("allow"):
            self._checkpointer.finish()
            again = start(self._run, self._checkpointer)
        self._batches_ahead = self._next_batch() - again.step
        return again.step, again.state, again.monitor

    def rows_of(self, step: int) -> str:
        """Says which data a step was trained on, by places in the order that the data's seed gives it."""
        size = self._run.config.global_batch_size
        first = (step - 1 + self._batches_ahead) * size
        return f"rows {first} to {first + size - 1} of the training data's order"

    def _next_batch(self) -> int:
        return self._batches.get_state()["next_index"]


def write_for_hub(run: Run, step: int, params: Params, origin: dict[str, Any]) -> None:
    """Writes the model of a step as `meap_jax.convert export` would; what is there already is replaced."""
    stored = held_model(run.model, params, run.prepared.tokenizer, step, {"origin": origin})
    adapter = run.config.checkpoint.export
    with jax.transfer_guard("allow"):  # Weights are to come to the host.
        export_stored(lambda: stored, run.workdir, _export_folder(run, step), adapter=adapter, replaces=True)


def is_written_for_hub(run: Run, step: int) -> bool:
    """Whether the first process has written the model of a step; the same on every process."""
    is_there = np.array(_export_folder(run, step).exists())
    return bool(multihost_utils.broadcast_one_to_all(is_there) if jax.process_count() > 1 else is_there)


def _export_folder(run: Run, step: int) -> epath.Path:
    return epath.Path(local_folder(run.workdir)) / EXPORT_FOLDER / str(step)
