"""Checkpoints: what a run needs to go on exactly where it was, by orbax, as plain nested dicts with a layout version.

A step's folder holds `params` (so that another run can start from them alone), `rest` (optimizer, step, keys) and
`meta` (JSON: layout, the whole config, the data's fingerprint and iterator state). Orbax writes beside and renames when
complete.
"""

import logging
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization

from meap_jax.config import ConfigError

_log = logging.getLogger(__name__)

LAYOUT = 1  # Raise when the tree of a checkpoint changes.
FOLDER = "checkpoints"


class Restored(NamedTuple):
    """A checkpoint read back."""

    step: int
    state: Any  # As the template that it was asked with.
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
            item_names=("params", "rest", "meta"),
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

    def newest_meta(self) -> dict[str, Any] | None:
        """The `meta` of the newest checkpoint that can be read; None if there is none. Reads no arrays."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._meta(step)
            except Exception as error:  # Orbax raises many kinds, a bare Exception for a truncated array.
                _log.warning("checkpoint %s: can't read its meta (%s)", self._folder / str(step), _short(error))
        return None

    def restore(self, template: Any) -> Restored | None:
        """The newest checkpoint that can be read; a damaged one is put aside, with a warning.

        Args:
          template: a state of ShapeDtypeStructs that carry shardings.

        Returns:
          None if there is no checkpoint at all.

        Raises:
          ConfigError: if there are checkpoints, but none can be read.
        """
        tree = serialization.to_state_dict(template)
        params, rest = tree.pop("params"), tree
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged = []
        for step in steps:
            try:
                read = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        params=ocp.args.StandardRestore(params),
                        rest=ocp.args.StandardRestore(rest),
                        meta=ocp.args.JsonRestore(),
                    ),
                )
            except Exception as error:
                _log.warning("checkpoint %s is damaged (%s)", self._folder / str(step), _short(error))
                damaged.append(step)
                continue
            self._set_aside(damaged)
            _check_layout(read["meta"], self._folder)
            state = serialization.from_state_dict(template, {"params": read["params"], **read["rest"]})
            return Restored(step, state, read["meta"])
        if steps:
            raise ConfigError(
                f"none of the checkpoints in {self._folder} can be read (steps {steps}); "
                "move the folder away to start again."
            )
        return None

    def close(self) -> None:
        """Waits for the save in progress."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _meta(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def _set_aside(self, steps: list[int]) -> None:
        for step in steps:
            if jax.process_index() == 0:
                aside = self._folder.parent / "damaged_checkpoints" / str(step)
                aside.parent.mkdir(parents=True, exist_ok=True)
                (self._folder / str(step)).rename(aside)
                _log.warning("moved the damaged checkpoint to %s", aside)
        if steps:
            self._manager.reload()


def restore_params(workdir: epath.Path, shapes: Any) -> Restored:
    """The parameters (only) of another run's newest checkpoint.

    Args:
      workdir: of that run.
      shapes: nested dict of ShapeDtypeStructs that carry shardings.

    Raises:
      ConfigError: if there is no checkpoint, or its parameters have other shapes.
    """
    folder = workdir / FOLDER
    if not folder.exists():
        raise ConfigError(f"{workdir} has no folder {FOLDER}: name the workdir of a run that has saved a checkpoint.")
    with ocp.CheckpointManager(folder, item_names=("params", "rest", "meta")) as manager:
        step = manager.latest_step()
        if step is None:
            raise ConfigError(f"{folder} holds no checkpoint: name the workdir of a run that has saved one.")
        try:
            read = manager.restore(
                step, args=ocp.args.Composite(params=ocp.args.StandardRestore(shapes), meta=ocp.args.JsonRestore())
            )
        except Exception as error:
            raise ConfigError(
                f"{folder / str(step)} does not hold parameters of this model: {_short(error)}"
            ) from error
    _check_layout(read["meta"], folder)
    return Restored(step, read["params"], read["meta"])


def _check_layout(meta: dict[str, Any], folder: epath.Path) -> None:
    if meta.get("layout") != LAYOUT:
        raise ConfigError(f"{folder} has layout {meta.get('layout')}, this version reads layout {LAYOUT}.")


def _short(error: BaseException) -> str:
    """The first cause in one line: what tensorstore said, without the specification that orbax wraps it in."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + "..."
