"""Checkpoints: saves and restores all that a run needs to go on exactly where it was, with orbax.

They are plain nested dicts of arrays with a layout version. A step's folder holds `params` (so that another run can
start from them alone), `rest` (optimizer, step, keys) and `meta` (JSON: layout, the whole config, the data's
fingerprint and iterator state, and a checksum of every array and of itself). Orbax writes into a temporary folder and
renames it when it is complete; in a bucket, which can't rename, it puts a file `commit_success.txt` there.
"""

import concurrent.futures
import logging
import time
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization
from jax.experimental import multihost_utils

from meap_jax import integrity
from meap_jax.errors import ConfigError, UserError
from meap_jax.paths import is_url
from meap_jax.restore import FOLDER, ITEMS, LAYOUT, Restored, newest_readable, on_all, sealed, short

_log = logging.getLogger(__name__)

COMMIT_MARK = "commit_success.txt"
DELETED = ".deleted"  # At the end of the name of a checkpoint that is being deleted.
PARAMS_CHUNK_BYTES = 2**22  # Of parameters saved alone: a chunk is compressed as a whole, in memory.
TRIES = 3  # To save, until the run ends.
SECONDS_BETWEEN_TRIES = 10.0


class SaveFailed(UserError, RuntimeError):
    """Nothing can be saved, so that training on would be in vain."""


class Keep(NamedTuple):
    """Which checkpoints of a run stay."""

    newest: int  # So many.
    every: int = 0  # And those of its multiples; 0: none.
    best: int = 0  # And so many with the lowest validation loss.

    def chosen(self, steps: Collection[int], losses: Mapping[int, float]) -> set[int]:
        """Those of `steps` that stay; `losses` are validation losses, of steps that have one."""
        newest = sorted(steps)[-self.newest :]
        every = [step for step in steps if self.every and step % self.every == 0]
        best = sorted((step for step in steps if step in losses), key=lambda step: (losses[step], step))[: self.best]
        return {*newest, *every, *best}


class Checkpointer:
    """The checkpoints of one run, in `workdir/checkpoints`. Saving is asynchronous; `close` waits for it."""

    def __init__(self, workdir: epath.Path, keep: Keep):
        self._folder, self._keep = workdir / FOLDER, keep
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            _clean_up(self._folder)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints were cleaned up")
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                # Without a limit: what is deleted is our own decision, when what was saved is known to be there.
                enable_async_checkpointing=True,
                cleanup_tmp_directories=False,  # In a bucket it would delete copies that lack the commit mark.
                create=False,
            ),
            item_names=ITEMS,
        )
        self._losses = self._known_losses() if keep.best else {}
        # Deletes what needn't stay, on the first process alone: the others need not know.
        self._deleter = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: int | None = None  # The step whose save is not known to have succeeded.
        self._failures = 0  # In a row.
        self._try_again_at = 0.0

    def save(self, step: int, state: Any, meta: dict[str, Any], loss: float | None = None) -> None:
        """Copies the state (a NamedTuple with `params`) to the host and returns; files are written meanwhile.

        Args:
          step: that it is the state of.
          state: of arrays.
          meta: of JSON's types.
          loss: on validation data; None: unknown.

        Raises:
          SaveFailed: for what happened to the save before, when it was the last of `TRIES`.
        """
        self._settle()
        tree = serialization.to_state_dict(state)
        params = tree.pop("params")
        if loss is not None:
            self._losses[step] = loss
            meta = meta | {"validation_loss": loss}
        sums = {"params": integrity.checksums(params), "rest": integrity.checksums(tree)}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            rest=ocp.args.StandardSave(tree),
            meta=ocp.args.JsonSave(sealed({**meta, "layout": LAYOUT, "step": step, "checksums": sums})),
        )
        self._pending = step
        try:
            # The training loop forbids copies that nobody asked for, and JAX takes orbax's for such.
            with jax.transfer_guard_device_to_host("allow"):
                self._manager.save(step, args=items, force=True)
        except Exception as error:
            if jax.process_count() > 1:
                raise  # The others are in the middle of it.
            self._failed(error)

    def is_to_save_again(self) -> bool:
        """Whether the last save has failed, and it is time to try again; waits for nothing.

        Where there are several processes it is False: they find out together, when the next save is due.
        """
        if jax.process_count() > 1:
            return False
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self._settle()
        return bool(self._failures) and time.monotonic() >= self._try_again_at

    def finish(self) -> bool:
        """Waits for the save in progress; returns whether there is nothing left to save again.

        Raises:
          SaveFailed: it was the last of `TRIES`.
        """
        self._settle()
        if self._failures:
            time.sleep(max(0.0, self._try_again_at - time.monotonic()))
        return not self._failures

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
        items = {"params": tree.pop("params"), "rest": tree}
        self._forget_what_is_gone()
        steps = [self._folder / str(step) for step in self._manager.all_steps()]
        if steps and all((step / "params").exists() and not (step / "rest").exists() for step in steps):
            raise ConfigError(
                f"{self._folder} holds parameters alone, from which no run can go on: set init_from to "
                f"{self._folder.parent}, and another --workdir."
            )
        found = newest_readable(self._manager, items)
        if found is None:
            return None
        step, read = found
        self._set_aside([newer for newer in self._manager.all_steps() if newer > step])
        state = serialization.from_state_dict(template, {"params": read["params"], **read["rest"]})
        return Restored(step, state, read["meta"])

    def close(self) -> None:
        """Waits for the save in progress; one that failed is in the log."""
        try:
            self._settle()
        finally:
            self._deleter.shutdown(wait=True)
            self._manager.close()

    def _settle(self) -> None:
        """Waits for the save in progress and finds out whether it is there; then what needn't stay is deleted.

        Raises:
          SaveFailed: it is not, for the last of `TRIES` times.
        """
        if self._pending is None:
            return
        step, error = self._pending, None
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as raised:
            error = raised
        # What the manager remembers may be a save that failed; what the first process finds on disk decides.
        is_there = error is None and (jax.process_index() != 0 or step in self._steps_on_disk())
        if not on_all(is_there):
            self._failed(error)
            return
        self._pending, self._failures = None, 0
        if jax.process_index() == 0:
            steps = self._steps_on_disk()
            for old in sorted(steps - self._keep.chosen(steps, self._losses)):
                self._deleter.submit(self._delete, self._folder / str(old))

    def _steps_on_disk(self) -> set[int]:
        """The steps of complete checkpoints."""
        found = (path for path in self._folder.iterdir() if path.name.isdigit())
        return {int(path.name) for path in found if not is_url(path) or (path / COMMIT_MARK).exists()}

    @staticmethod
    def _delete(folder: epath.Path) -> None:
        """Deletes a checkpoint; under another name first, so that no half of one is ever taken for a whole."""
        try:
            going = folder.parent / f"{folder.name}{DELETED}"
            if is_url(folder):
                (folder / COMMIT_MARK).unlink(missing_ok=True)
                folder.rmtree()
            elif folder.exists():
                folder.rename(going)
                going.rmtree()
        except OSError as error:
            _log.warning("the checkpoint %s, which needn't stay, can't be deleted (%s)", folder, error)

    def _forget_what_is_gone(self) -> None:
        """Makes orbax look which checkpoints there are, when no deletion is going on."""
        self._deleter.submit(int).result()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints were deleted")
        self._manager.reload()

    def _failed(self, error: Exception | None) -> None:
        step, self._pending = self._pending, None
        self._failures += 1
        self._try_again_at = time.monotonic() + SECONDS_BETWEEN_TRIES * self._failures
        cause = short(error) if error else "another process failed, or the files are not there"
        self._deleter.submit(int).result()  # It has nothing to do any more.
        if jax.process_index() == 0:
            _clean_up(self._folder)
        self._forget_what_is_gone()
        if self._failures >= TRIES:
            newest = self._manager.latest_step()
            kept = f"the same command goes on from step {newest}" if newest is not None else "none was saved before"
            raise SaveFailed(
                f"the checkpoint of step {step} can't be saved in {self._folder}, after {TRIES} tries ({cause}): make "
                f"room, or see to the disk; {kept}."
            )
        _log.warning("the checkpoint of step %d was not saved (%s): it will be tried again", step, cause)

    def _known_losses(self) -> dict[int, float]:
        found = {}
        for step in self._manager.all_steps():
            try:
                read = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
                found[step] = float(read["meta"]["validation_loss"])
            except Exception:  # Damaged, or without one: no candidate for the best.
                _log.debug("checkpoint %d has no validation loss", step)
        return found

    def _set_aside(self, steps: list[int]) -> None:
        for step in steps:
            if jax.process_index() == 0:
                aside = _free(self._folder.parent / "damaged_checkpoints" / str(step))
                aside.parent.mkdir(parents=True, exist_ok=True)
                (self._folder / str(step)).rename(aside)
                _log.warning("moved the damaged checkpoint to %s", aside)
        if steps:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints were moved")
            self._manager.reload()


def _clean_up(folder: epath.Path) -> None:
    """Deletes what saves left that never came to an end, and puts aside what only looks like a checkpoint.

    The latter are folders in a bucket without a commit mark: perhaps half of a checkpoint, perhaps a whole one that was
    copied from a disk, where there are no marks.
    """
    for path in list(folder.iterdir()):
        if ".orbax-checkpoint-tmp" in path.name or path.name.endswith(DELETED):
            try:
                path.rmtree()
            except OSError as error:  # Of a save that failed, other threads may still write; the next start has none.
                _log.info("%s can't be deleted now (%s)", path, error)
        elif is_url(folder) and path.name.isdigit() and not (path / COMMIT_MARK).exists():
            aside = _free(folder.parent / "unmarked_checkpoints" / path.name)
            aside.parent.mkdir(parents=True, exist_ok=True)
            path.rename(aside)
            _log.warning(
                "%s has no %s, so that it may be half a checkpoint: it was moved to %s. If it is whole, such as a copy "
                "from a disk, put an empty file of that name into it and move it back.", path, COMMIT_MARK, aside,
            )  # fmt: skip


def _free(path: epath.Path) -> epath.Path:
    """The path, or with a number behind it if it is taken."""
    names = [path, *(path.parent / f"{path.name}-{i}" for i in range(1, 1_000))]
    return next(name for name in names if not name.exists())


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
        sums = {"params": integrity.checksums(params)}
        meta = sealed({**meta, "layout": LAYOUT, "step": step, "checksums": sums})
        items = {"params": ocp.args.PyTreeSave(params, chunks), "meta": ocp.args.JsonSave(meta)}
        manager.save(step, args=ocp.args.Composite(**items))
