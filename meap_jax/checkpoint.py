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
PARAMS_CHUNK_BYTES = 2**22  # Of parameters saved alone: a chunk is compressed as a whole, in memory.
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
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(tree.pop("params")),
            rest=ocp.args.StandardSave(tree),
            meta=ocp.args.JsonSave({"layout": LAYOUT, **meta}),
        )
        # The training loop forbids copies that nobody asked for, and JAX takes orbax's for such.
        with jax.transfer_guard_device_to_host("allow"):
            self._manager.save(step, args=items)

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
        newest = self._folder / str(self._manager.latest_step())
        if (newest / "params").exists() and not (newest / "rest").exists():
            raise ConfigError(
                f"{self._folder} holds parameters alone, from which no run can go on: set init_from to "
                f"{self._folder.parent}, and another --workdir."
            )
        found = _newest_readable(self._manager, items)
        if found is None:
            return None
        step, read = found
        self._set_aside([newer for newer in self._manager.all_steps() if newer > step])
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
      ConfigError: if it has another layout, or there are checkpoints of which none can be read.
    """
    found = _read(workdir, {})
    return found and found[1]["meta"]


def read_meta(workdir: epath.Path, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """Reads the `meta`, and no arrays, of a checkpoint; returns its step and that.

    Raises:
      ConfigError: if there is none, or it can't be read.
    """
    found = _read(workdir, {}, step)
    if found is None:
        raise ConfigError(f"{workdir / FOLDER} holds no checkpoint: name the workdir of a run that has saved one.")
    return found[0], found[1]["meta"]


def save_params(workdir: epath.Path, params: Any, meta: dict[str, Any], step: int = 0) -> None:
    """Writes parameters alone as the checkpoint of a step, and waits for it; `restore_params` reads them.

    Args:
      workdir: that holds no such step.
      params: nested dict of arrays.
      meta: what `Checkpointer.save` is given; at least the hash of the `tokenizer`.
      step: that they are of.
    """
    # One array at a time is copied to the host, or a little more than the largest; by default it would be all of them.
    limit = max(x.nbytes for x in jax.tree.leaves(params)) + 2**20
    one_by_one = ocp.BasePyTreeCheckpointHandler(save_concurrent_bytes=limit, save_device_host_concurrent_bytes=limit)
    handlers = {"params": ocp.PyTreeCheckpointHandler(handler_impl=one_by_one), "meta": ocp.JsonCheckpointHandler()}
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=PARAMS_CHUNK_BYTES), params)
    with ocp.CheckpointManager(workdir / FOLDER, item_handlers=handlers) as manager:
        items = {"params": ocp.args.PyTreeSave(params, chunks), "meta": ocp.args.JsonSave({"layout": LAYOUT, **meta})}
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
    found = _read(workdir, {"params": ocp.args.StandardRestore(shapes)}, step)
    if found is None:
        raise ConfigError(f"{workdir / FOLDER} holds no checkpoint: name the workdir of a run that has saved one.")
    step, read = found
    return Restored(step, read["params"], read["meta"])


def restore_some_params(workdir: epath.Path, shapes: Any, step: int) -> Any:
    """Reads some of the parameters of a checkpoint, and nothing else of it.

    Args:
      workdir: of the run.
      shapes: nested dict of ShapeDtypeStructs that carry shardings, with these parameters alone.
      step: of the checkpoint.

    Raises:
      ConfigError: if they can't be read.
    """
    how = ocp.checkpoint_utils.construct_restore_args(shapes)
    items = {"params": ocp.args.PyTreeRestore(shapes, restore_args=how, partial_restore=True)}
    found = _read(workdir, items, step)
    if found is None:
        raise ConfigError(f"{workdir / FOLDER} holds no checkpoint: name the workdir of a run that has saved one.")
    return found[1]["params"]


def _read(
    workdir: epath.Path, items: dict[str, ocp.args.CheckpointArgs], step: int | None = None
) -> tuple[int, Any] | None:
    """Calls `_newest_readable` on the checkpoints of a workdir, which may have none."""
    if not (workdir / FOLDER).exists():
        return None
    with ocp.CheckpointManager(workdir / FOLDER, item_names=ITEMS) as manager:
        return _newest_readable(manager, items, step)


def _newest_readable(
    manager: ocp.CheckpointManager, items: dict[str, ocp.args.CheckpointArgs], step: int | None = None
) -> tuple[int, Any] | None:
    """Reads `items` and `meta` of the newest checkpoint that every process can read; returns its step and them.

    A read that failed is tried once more before its checkpoint counts as damaged.

    Args:
      manager: of the checkpoints.
      items: how to read each.
      step: reads this checkpoint alone.

    Returns:
      None if there is no checkpoint at all.

    Raises:
      ConfigError: there are checkpoints, but not that of `step`, none that can be read, or of another layout.
    """
    folder, steps = manager.directory, sorted(manager.all_steps(), reverse=True)
    if not steps:
        return None
    if step is not None and step not in steps:
        raise ConfigError(f"the step is {step}, but {folder} holds {', '.join(map(str, sorted(steps)))}.")
    steps = steps if step is None else [step]
    for step in steps:
        for attempt in (1, 2):
            error = None
            try:
                read = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **items))
            except Exception as raised:  # Orbax raises many kinds, a bare Exception for a truncated array.
                error = raised
            if multihost_utils.process_allgather(np.array(error is None)).all():
                if (layout := read["meta"].get("layout")) != LAYOUT:
                    raise ConfigError(f"{folder} has layout {layout}, this version reads layout {LAYOUT}.")
                return step, read
            cause = _short(error) if error else "another process failed"
            if attempt == 1:
                _log.warning("checkpoint %s can't be read (%s): trying again", folder / str(step), cause)
                time.sleep(SECONDS_BETWEEN_READS)
            else:
                _log.warning("checkpoint %s is damaged (%s)", folder / str(step), cause)
    raise ConfigError(
        f"none of the checkpoints in {folder} (steps {steps}) can be read as this model's; the reasons are logged "
        "above. To train from the start, move the folder away."
    )


def _short(error: BaseException) -> str:
    """The first cause in one line: what tensorstore said, without the specification that orbax wraps it in."""
    while error.__cause__ is not None:
        error = error.__cause__
    return textwrap.shorten(str(error), 200, placeholder=" ...")
