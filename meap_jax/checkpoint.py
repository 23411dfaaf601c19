"""Checkpoints: saves and restores all that a run needs to go on exactly where it was, with orbax.

They are plain nested dicts of arrays with a layout version. A step's folder holds `params` (so that another run can
start from them alone), `rest` (optimizer, step, keys) and `meta` (JSON: layout, the whole config, the data's
fingerprint and iterator state). Orbax writes into a temporary folder and renames it when it is complete.
"""

import logging
import textwrap
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization
from jax.experimental import multihost_utils

from meap_jax.errors import ConfigError

_log = logging.getLogger(__name__)

LAYOUT = 2  # Raise when the tree of a checkpoint changes.
FOLDER = "checkpoints"
ITEMS = ("params", "rest", "meta")
SECONDS_BETWEEN_READS = 2.0  # A network that drops one read is no damaged checkpoint.


class Restored(NamedTuple):
    """A checkpoint that was read."""

    step: int
    state: Any  # A tree like the template that was given.
    meta: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run, in `workdir/checkpoints`. Saving is asynchronous; `close` waits for it."""

    def __init__(self, workdir: epath.Path, keep: int):
        self._folder = workdir / FOLDER
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True, create=True
            ),
            item_names=ITEMS,
        )

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Copies the state (a NamedTuple with `params`) to the host and returns; files are written meanwhile."""
        tree = serialization.to_state_dict(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(tree.pop("params")),
                rest=ocp.args.StandardSave(tree),
                meta=ocp.args.JsonSave({"layout": LAYOUT, **meta}),
            ),
        )

    def restore(self, template: Any) -> Restored | None:
        """Reads the newest checkpoint that can be read; a damaged one is put aside, with a warning.

        Args:
          template: a state of ShapeDtypeStructs that carry shardings.

        Returns:
          None if there is no checkpoint at all.

        Raises:
          ConfigError: if there are checkpoints, but none can be read.
        """
        tree = serialization.to_state_dict(template)
        items = {"params": ocp.args.StandardRestore(tree.pop("params")), "rest": ocp.args.StandardRestore(tree)}
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            return None
        if not (self._folder / str(steps[0]) / "rest").exists() and (self._folder / str(steps[0]) / "params").exists():
            raise ConfigError(
                f"{self._folder} holds parameters alone, from which no run can go on: set init_from to "
                f"{self._folder.parent}, and another --workdir."
            )
        found = _newest_readable(self._manager, self._folder, steps, items)
        if found is None:
            raise ConfigError(
                f"none of the checkpoints in {self._folder} can be read (steps {steps}); "
                "move the folder away to start again."
            )
        step, read = found
        self._set_aside([newer for newer in steps if newer > step])
        state = serialization.from_state_dict(template, {"params": read["params"], **read["rest"]})
        return Restored(step, state, read["meta"])

    def close(self) -> None:
        """Waits for the save in progress."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _set_aside(self, steps: list[int]) -> None:
        for step in steps:
            if jax.process_index() == 0:
                aside = self._folder.parent / "damaged_checkpoints" / str(step)
                aside.parent.mkdir(parents=True, exist_ok=True)
                (self._folder / str(step)).rename(aside)
                _log.warning("moved the damaged checkpoint to %s", aside)
        if steps:
            self._manager.reload()


def newest_meta(workdir: epath.Path) -> dict[str, Any] | None:
    """Reads the `meta`, and no arrays, of a run's newest checkpoint that can be read; None if there is none.

    Raises:
      ConfigError: if it has another layout.
    """
    if not (workdir / FOLDER).exists():
        return None
    with ocp.CheckpointManager(workdir / FOLDER, item_names=ITEMS) as manager:
        found = _newest_readable(manager, workdir / FOLDER, sorted(manager.all_steps(), reverse=True), {})
    return found and found[1]["meta"]


def save_params(workdir: epath.Path, params: Any, meta: dict[str, Any], step: int = 0) -> None:
    """Writes parameters alone as the checkpoint of a step, and waits for it; `restore_params` reads them.

    Args:
      workdir: that holds no such step.
      params: nested dict of arrays.
      meta: what `Checkpointer.save` is given; at least the hash of the `tokenizer`.
      step: that they are of.
    """
    with ocp.CheckpointManager(workdir / FOLDER, item_names=ITEMS) as manager:
        items = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave({"layout": LAYOUT, **meta})}
        manager.save(step, args=ocp.args.Composite(**items))


def restore_params(workdir: epath.Path, shapes: Any, step: int | None = None) -> Restored:
    """Reads the parameters (only) of a checkpoint; changes nothing there.

    Args:
      workdir: of that run.
      shapes: nested dict of ShapeDtypeStructs that carry shardings.
      step: of the checkpoint; default: the newest that can be read.

    Raises:
      ConfigError: if there is no checkpoint, or none that holds parameters of these shapes.
    """
    folder = workdir / FOLDER
    if not folder.exists():
        raise ConfigError(f"{workdir} has no folder {FOLDER}: name the workdir of a run that has saved a checkpoint.")
    with ocp.CheckpointManager(folder, item_names=ITEMS) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if not steps:
            raise ConfigError(f"{folder} holds no checkpoint: name the workdir of a run that has saved one.")
        if step is not None and step not in steps:
            raise ConfigError(f"the step is {step}, but {folder} holds {', '.join(map(str, sorted(steps)))}.")
        steps = steps if step is None else [step]
        found = _newest_readable(manager, folder, steps, {"params": ocp.args.StandardRestore(shapes)})
    if found is None:
        raise ConfigError(
            f"none of the checkpoints in {folder} (steps {steps}) gave parameters of this model; "
            "the reasons are logged above."
        )
    step, read = found
    return Restored(step, read["params"], read["meta"])


def _newest_readable(
    manager: ocp.CheckpointManager, folder: epath.Path, steps: list[int], items: dict[str, ocp.args.CheckpointArgs]
) -> tuple[int, Any] | None:
    """Reads `items` and `meta` of the first of `steps` for which every process can; returns that step and them.

    A read that failed is tried once more before its checkpoint counts as damaged.

    Raises:
      ConfigError: if that checkpoint has another layout.
    """
    for step in steps:
        for attempt in (1, 2):
            error = None
            try:
                read = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **items))
            except Exception as raised:  # Orbax raises many kinds, a bare Exception for a truncated array.
                error = raised
            if _all_processes(error is None):
                if (layout := read["meta"].get("layout")) != LAYOUT:
                    raise ConfigError(f"{folder} has layout {layout}, this version reads layout {LAYOUT}.")
                return step, read
            cause = _short(error) if error else "another process failed"
            if attempt == 1:
                _log.warning("checkpoint %s can't be read (%s): trying again", folder / str(step), cause)
                time.sleep(SECONDS_BETWEEN_READS)
            else:
                _log.warning("checkpoint %s is damaged (%s)", folder / str(step), cause)
    return None


def _all_processes(ok: bool) -> bool:
    return ok if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(ok)).all())


def _short(error: BaseException) -> str:
    """The first cause in one line: what tensorstore said, without the specification that orbax wraps it in."""
    while error.__cause__ is not None:
        error = error.__cause__
    return textwrap.shorten(str(error), 200, placeholder=" ...")
