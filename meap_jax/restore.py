"""Reads checkpoints: finds the newest that can be read, and compares all that is read with its checksums."""

import errno
import hashlib
import json
import logging
import re
import textwrap
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from meap_jax import integrity
from meap_jax.errors import ConfigError

_log = logging.getLogger(__name__)

LAYOUT = 3  # Raise when the tree of a checkpoint changes.
READABLE_LAYOUTS = (2, LAYOUT)  # 2 had no checksums.
FOLDER = "checkpoints"
ITEMS = ("params", "rest", "meta")
SECONDS_BETWEEN_READS = 2.0  # A network that drops one read is no damaged checkpoint.


class Restored(NamedTuple):
    """A checkpoint that was read."""

    step: int
    state: Any  # A tree like the template that was given.
    meta: dict[str, Any]


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


def restore_params(workdir: epath.Path, shapes: Any, step: int | None = None) -> Restored:
    """Reads the parameters (only) of a checkpoint; changes nothing there.

    Args:
      workdir: of that run.
      shapes: nested dict of ShapeDtypeStructs that carry shardings.
      step: of the checkpoint; default: the newest that can be read.

    Raises:
      ConfigError: if there is no checkpoint, or none that holds parameters of these shapes.
    """
    found = _read(workdir, {"params": shapes}, step)
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
    found = _read(workdir, {"params": shapes}, step, is_partial=True)
    if found is None:
        raise ConfigError(f"{workdir / FOLDER} holds no checkpoint: name the workdir of a run that has saved one.")
    return found[1]["params"]


def _read(
    workdir: epath.Path, items: Mapping[str, Any], step: int | None = None, *, is_partial: bool = False
) -> tuple[int, Any] | None:
    """Calls `newest_readable` on the checkpoints of a workdir, which may have none."""
    if not (workdir / FOLDER).exists():
        return None
    with ocp.CheckpointManager(workdir / FOLDER, item_names=ITEMS) as manager:
        return newest_readable(manager, items, step, is_partial=is_partial)


def newest_readable(
    manager: ocp.CheckpointManager, items: Mapping[str, Any], step: int | None = None, *, is_partial: bool = False
) -> tuple[int, Any] | None:
    """Reads `items` and `meta` of the newest checkpoint that every process can read; returns its step and them.

    A read that failed is tried once more before its checkpoint counts as damaged.

    Args:
      manager: of the checkpoints.
      items: a tree of ShapeDtypeStructs that carry shardings, for each.
      step: reads this checkpoint alone.
      is_partial: the trees may lack arrays that the checkpoint has.

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
            error, read = None, {}
            try:
                read = _read_step(manager, step, items, is_partial)
            except Exception as raised:  # Orbax raises many kinds, a bare Exception for a truncated array.
                error = raised
            if not on_all(error is None or is_damage(error)) and attempt == 2:
                reason = short(error) if error else "another host says why"
                raise ConfigError(
                    f"checkpoint {folder / str(step)} can't be read now ({reason}), which says nothing about the "
                    "checkpoint itself: start again when that is over."
                )
            if on_all(error is None):
                if (layout := read["meta"].get("layout")) not in READABLE_LAYOUTS:
                    readable = " and ".join(map(str, READABLE_LAYOUTS))
                    raise ConfigError(
                        f"{folder} has layout {layout}, this version reads layout {readable}: use the version that "
                        "wrote it."
                    )
                return step, read
            cause = short(error) if error else "another process failed"
            if attempt == 1:
                _log.warning("checkpoint %s can't be read (%s): trying again", folder / str(step), cause)
                time.sleep(SECONDS_BETWEEN_READS)
            else:
                _log.warning("checkpoint %s is damaged (%s)", folder / str(step), cause)
    raise ConfigError(
        f"none of the checkpoints in {folder} (steps {steps}) can be read as this model's; the reasons are logged "
        "above. To train from the start, move the folder away."
    )


def is_damage(error: Exception) -> bool:
    """Whether an error shows that a checkpoint isn't what was saved, and not that a disk, network or memory failed."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno in _PASSING):
            return False
        seen = seen.__cause__
    return not _NO_DAMAGE.search(str(error))


# What a disk or network says that fails for a while; a file in the place of a folder, or none, is damage.
_PASSING = {
    errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.ETIMEDOUT,
    errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENOTCONN,
}  # fmt: skip
# In errors of tensorstore and XLA, which have no types.
_NO_DAMAGE = re.compile(
    r"RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|Too many open files|"
    r"Input/output error|Stale file handle|[Oo]ut of memory"
)


def _read_step(manager: ocp.CheckpointManager, step: int, items: Mapping[str, Any], is_partial: bool) -> dict[str, Any]:
    """Reads `meta` and `items` of a checkpoint, and compares them with their checksums; of another layout `meta` alone.

    Raises:
      ValueError: for what is not as it was saved.
      Exception: of orbax, for what can't be read.
    """
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if "sha256" in meta and meta["sha256"] != _digest(meta):
        raise ValueError("meta is not as it was saved: its SHA-256 is another")
    if meta.get("layout") not in READABLE_LAYOUTS:
        return {"meta": meta}
    if meta["layout"] >= 3 and "sha256" not in meta:
        raise ValueError("meta is not as it was saved: it has no SHA-256")
    if meta["layout"] >= 3 and meta["step"] != step:
        raise ValueError(f"it is the checkpoint of step {meta['step']} under another name")
    read = {"meta": meta}
    for item, template in items.items():
        sums = meta.get("checksums", {}).get(item, {})
        shapes = _as_saved(template, sums)
        if is_partial:
            how = ocp.checkpoint_utils.construct_restore_args(shapes)
            args = ocp.args.PyTreeRestore(shapes, restore_args=how, partial_restore=True)
        else:
            args = ocp.args.StandardRestore(shapes)
        tree = manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        if sums:
            found = integrity.checksums(tree)
            if wrong := [name for name, one in found.items() if sums.get(name) != one]:
                raise ValueError(f"{item}.{wrong[0]} is not as it was saved: its checksum is another")
        read[item] = _cast(tree, template)
    return read


def _as_saved(template: Any, sums: Mapping[str, str]) -> Any:
    """A template with the dtypes with which arrays were saved, for a checksum is of those bits."""
    leaves, tree = jax.tree.flatten(template)
    dtypes = [sums.get(name, leaf.dtype.name).partition(":")[0] for name, leaf in integrity.named(template)]
    return jax.tree.unflatten(tree, [x.update(dtype=dtype) for x, dtype in zip(leaves, dtypes, strict=True)])


def _cast(tree: Any, template: Any) -> Any:
    """The arrays in the dtypes of the template."""
    return jax.tree.map(lambda x, t: x if x.dtype == t.dtype else x.astype(t.dtype), tree, template)


def on_all(is_true: bool) -> bool:
    """Whether something is true on every process."""
    with jax.transfer_guard("allow"):
        return bool(multihost_utils.process_allgather(np.array(is_true)).all())


def short(error: BaseException) -> str:
    """The first cause in one line: what tensorstore said, without the specification that orbax wraps it in."""
    while error.__cause__ is not None:
        error = error.__cause__
    return textwrap.shorten(str(error), 200, placeholder=" ...")


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """`meta` with the SHA-256 of itself."""
    return {**meta, "sha256": _digest(meta)}


def _digest(meta: Mapping[str, Any]) -> str:
    content = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode()).hexdigest()
