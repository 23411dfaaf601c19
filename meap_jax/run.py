"""Opens a run, which is a model and its data."""

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from meap_jax import hosts, peers
from meap_jax.config import changed_on_resume, flatten, mixture
from meap_jax.corpus.prepare import prepare
from meap_jax.data.prepared import Prepared
from meap_jax.data.spec import data_spec
from meap_jax.errors import ConfigError
from meap_jax.lease import Lease, held
from meap_jax.memory import check_fits
from meap_jax.metrics import local_folder
from meap_jax.model.decoder import Definition
from meap_jax.models import Model, define_model
from meap_jax.restore import newest_meta
from meap_jax.train import abstract_inputs

_log = logging.getLogger(__name__)


class Run(NamedTuple):
    """A model, its workdir and its data."""

    config: ml_collections.ConfigDict
    mesh: Mesh
    definition: Definition
    workdir: epath.Path
    prepared: Prepared

    @property
    def model(self) -> Model:
        """The run without its data."""
        return Model(self.config, self.mesh, self.definition)


def open_run(config: ml_collections.ConfigDict, workdir: epath.Path, mesh: Mesh | None = None) -> Run:
    """Makes the mesh and the model definition of a config that was checked, and opens its data.

    Args:
      config: of the run.
      workdir: absolute.
      mesh: takes the place of the config's.

    Raises:
      ConfigError, DataError: for a mesh, batch or data that do not fit, or checkpoints in the workdir that were made
        with another config or on other data.
    """
    model = define_model(config, mesh)
    check_fits(
        abstract_inputs(config, model.definition, model.mesh),
        model.mesh.devices.flat,
        f"a model of {model.definition.config.num_parameters:,} parameters, trained on {config.global_batch_size:,} "
        f"rows of {config.seq_len:,} tokens a step,",
        "lower model.*, global_batch_size or seq_len, or split it over more devices (mesh.fsdp, mesh.tensor)",
    )
    meta = newest_meta(workdir)
    if meta is not None:
        check_resume(config, meta, workdir)  # Before the data: it may be in the workdir, and the other config's.
    prepared = open_data(config, workdir)
    if meta is not None:
        check_data(prepared, meta, workdir)
    if config.objective.name == "ntp" and config.sft.arrangement != "none":
        _log.warning("sft.arrangement is %s: NTP learns MEAP's copies too, without masks", config.sft.arrangement)
    resolved = with_steps(config, prepared)
    if config.num_epochs:
        _log.info("num_epochs = %g: %d steps", config.num_epochs, resolved.num_steps)
    return Run(*model._replace(config=resolved), workdir, prepared)


def open_data(config: ml_collections.ConfigDict, workdir: epath.Path) -> Prepared:
    """Opens the prepared data, and prepares it first if this is the first run that needs it.

    The first process prepares, the others wait for it. Where they don't share its disk, each then prepares its own.

    Raises:
      ConfigError: for a folder frozen with other options, data that differs between processes, or a tokenizer whose
        [MASK] is not `objective.mask_id`.
    """
    folder = config.data.prepared or str(local_folder(workdir) / "data")
    spec = data_spec(config)
    if jax.process_index() == 0:
        prepared = prepare(folder, spec)
    if jax.process_count() > 1:
        peers.wait_for_first("prepared data")
        prepared = prepare(folder, spec)
        advice = f"prepare {folder} once, copy it to all hosts, and set data.prepared to it."
        peers.check_same("data", {"the data's fingerprint": prepared.fingerprint[:12]}, advice)
    prepared.check_mask_id(config.objective.mask_id)
    check_epochs(with_steps(config, prepared), prepared)
    return prepared


def check_hosts(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Compares what a run is made from between its hosts, before anything is prepared or compiled.

    Raises:
      ConfigError: on every host, naming the hosts, the field and both values.
    """
    fields = {name: repr(value) for name, value in flatten(config).items()}
    advice = "start all of them with the same command."
    peers.check_same("config", fields | {"--workdir": str(workdir)}, advice)
    if jax.process_count() > 1:
        devices = {"devices": str(jax.local_device_count()), "device_kind": jax.local_devices()[0].device_kind}
        peers.check_same("devices", devices, "all hosts must have the same devices.")


def with_steps(config: ml_collections.ConfigDict, prepared: Prepared) -> ml_collections.ConfigDict:
    """The config with the number of steps that its epochs take; with `num_epochs` 0 as it is.

    Where the mixture reads sources at different speeds, an epoch is over when each was read once or more.
    """
    if not config.num_epochs:
        return config
    weights = mixture(config)
    rows = max(prepared.blocks_an_epoch(name) * sum(weights.values()) / weight for name, weight in weights.items())
    resolved = copy.deepcopy(config)
    resolved.num_steps = max(1, round(config.num_epochs * rows / config.global_batch_size))
    return resolved


def check_epochs(config: ml_collections.ConfigDict, prepared: Prepared) -> None:
    """Stops a run that would take more passes over a source than the config allows.

    The alternative, to leave out a source that was read often enough, would change the mixture in the middle of a run.

    Raises:
      ConfigError: naming the source, its passes, and the steps at most.
    """
    weights = mixture(config)
    for name, weight in weights.items():
        limit = config.data.sources[name].epochs if name in config.data.sources else 0
        if not limit:
            continue
        num_blocks = len(prepared.blocks(name, "train"))
        blocks_a_step = config.global_batch_size * weight / sum(weights.values())
        epochs = config.num_steps * blocks_a_step / num_blocks
        if epochs > limit:
            most = int(limit * num_blocks / blocks_a_step)
            way = f"num_steps to {most}" if most else "global_batch_size"
            raise ConfigError(
                f"data.sources.{name}.epochs is {limit:g}, but {config.num_steps} steps would take {epochs:.3g} passes "
                f"over its {num_blocks} blocks: lower {way}, or its weight in data.mixture."
            )


def check_resume(config: ml_collections.ConfigDict, meta: dict[str, Any], workdir: epath.Path) -> None:
    """Compares a config with that of a checkpoint from which it would go on.

    Raises:
      ConfigError: naming the fields that differ and may not.
    """
    changed = changed_on_resume(meta["config"], config)
    if changed:
        listed = "; ".join(f"{name} was {old!r} and is now {new!r}" for name, (old, new) in changed.items())
        raise ConfigError(
            f"{workdir} holds checkpoints of another config: {listed}. Use another --workdir, or the old values."
        )


def check_data(prepared: Prepared, meta: dict[str, Any], workdir: epath.Path) -> None:
    """Compares prepared data with that of a checkpoint in `workdir`.

    Raises:
      ConfigError: naming both fingerprints where they differ.
    """
    if meta["fingerprint"] != prepared.fingerprint:
        raise ConfigError(
            f"{workdir} holds checkpoints made on data {meta['fingerprint']}, but {prepared.folder} is "
            f"{prepared.fingerprint}. Use the same prepared data, or another --workdir."
        )


@contextlib.contextmanager
def held_by_run(folder: epath.Path) -> Iterator[Lease | None]:
    """Holds a folder for a run of one or several processes: the first holds it, and all raise if it can't.

    Yields:
      The lease on the first process, None on the others.

    Raises:
      ConfigError: as `held`.
    """
    with contextlib.ExitStack() as stack:
        lease, error = None, None
        if jax.process_index() == 0:
            try:
                lease = stack.enter_context(held(folder))
            except ConfigError as raised:
                error = raised
        peers.wait_for_first("workdir")  # It may watch the workdir for a while.
        if jax.process_count() > 1 and not multihost_utils.broadcast_one_to_all(np.array(error is None)):
            error = error or ConfigError(f"host 0 can't have {folder} for this run: its log says why.")
        if error is not None:
            raise error
        yield lease


def make_folder(name: str, folder: epath.Path) -> None:
    """Makes a folder that the user named.

    Raises:
      ConfigError: if it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ImportError) as error:  # ImportError: a bucket whose file system is not installed.
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{name} is {folder}, but must be a folder that can be made: {reason}.") from error


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, and the backend."""
    return {**hosts.versions(), "backend": jax.default_backend()}
