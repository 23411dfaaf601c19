"""Opens a run, which is a model and its data, and restores, imports or draws the state that it starts from."""

import copy
import dataclasses
import functools
import importlib.metadata
import logging
import platform
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from meap_jax import __version__, partition
from meap_jax.checkpoint import Checkpointer, Restored, newest_meta, read_meta, restore_params, restore_some_params
from meap_jax.config import changed_on_resume, flatten, mixture, read_back
from meap_jax.corpus.prepare import prepare
from meap_jax.data.prepared import Prepared
from meap_jax.data.spec import ChatPlanSpec, data_spec
from meap_jax.errors import ConfigError
from meap_jax.metrics import local_folder
from meap_jax.model.config import ModelConfig, RopeScaling
from meap_jax.model.decoder import Definition, Params, define
from meap_jax.models import Model, define_model, origin_of
from meap_jax.objective import named_keys
from meap_jax.paths import absolute
from meap_jax.quantization import is_quantized
from meap_jax.train import TrainState, abstract_inputs, init_state, state_of_params

_log = logging.getLogger(__name__)

# Fields of `model` that shapes of parameters don't show.
OF_THE_DECODER = (
    "num_tokens", "rope_base", *(f"rope_scaling.{name}" for name in RopeScaling.__dataclass_fields__), "norm_eps",
    "window", "window_layers", "lora.alpha",
)  # fmt: skip
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


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
    meta = newest_meta(workdir)
    if meta is not None:
        check_resume(config, meta, workdir)  # Before the data: it may be in the workdir, and the other config's.
    prepared = open_data(config, workdir)
    if meta is not None:
        check_data(prepared, meta, workdir)
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
        multihost_utils.sync_global_devices("prepared data")
        prepared = prepare(folder, spec)
        digest = np.frombuffer(bytes.fromhex(prepared.fingerprint), np.uint8)
        if (multihost_utils.process_allgather(digest) != digest).any():
            raise ConfigError(
                f"{folder} differs between hosts ({prepared.fingerprint[:12]} on host {jax.process_index()}): prepare "
                "it once, copy it to all of them, and set data.prepared to it."
            )
    if prepared.tokenizer.mask_id != config.objective.mask_id:
        raise ConfigError(
            f"objective.mask_id is {config.objective.mask_id}, but [MASK] of the tokenizer in {folder} is "
            f"{prepared.tokenizer.mask_id}."
        )
    check_epochs(with_steps(config, prepared), prepared)
    return prepared


def with_steps(config: ml_collections.ConfigDict, prepared: Prepared) -> ml_collections.ConfigDict:
    """The config with the number of steps that its epochs take; with `num_epochs` 0 as it is.

    Where the mixture reads sources at different speeds, an epoch is over when each was read once or more.
    """
    if not config.num_epochs:
        return config
    if config.sft.epoch_of != "own":
        plans = {
            name: dataclasses.replace(plan, arrangement=config.sft.epoch_of) if isinstance(plan, ChatPlanSpec) else plan
            for name, plan in prepared.spec.plans.items()
        }
        prepared = prepare(prepared.folder, dataclasses.replace(prepared.spec, plans=plans))
    weights = mixture(config)
    rows = max(
        prepared.plan_manifest(name)["splits"]["train"]["blocks"] * sum(weights.values()) / weight
        for name, weight in weights.items()
    )
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


class Start(NamedTuple):
    """The state that a run starts from."""

    step: int
    state: TrainState
    data: dict[str, Any] | None  # State of the data iterator; None: from the first block.
    origin: dict[str, Any]  # What an import said of the model that training began from; where answers end.


def start(run: Run, checkpointer: Checkpointer) -> Start:
    """Restores, imports or draws the state that a run starts from: the first of these that there is.

    1. Its own newest readable checkpoint: everything goes on as it was.
    2. `init_from`: the parameters of another run, with a fresh optimizer, step 0 and the first block of data. Adapters
       that it lacks are drawn.
    3. From scratch.
    """
    template, _ = abstract_inputs(run.config, run.definition, run.mesh)
    restored = checkpointer.restore(template)
    if restored is not None:
        _log.info("resuming from step %d of %s", restored.step, run.workdir)
        if restored.step >= run.config.num_steps:
            _log.info("nothing is left to do: num_steps is %d", run.config.num_steps)
        return Start(restored.step, restored.state, restored.meta["data"], restored.meta.get("origin", {}))

    shardings = jax.tree.map(lambda x: x.sharding, template)
    if run.config.init_from is not None:

        def with_params(given: Params) -> TrainState:
            """The state with these parameters; adapters that are not among them are drawn."""
            drawn = run.definition.init(named_keys(run.config)["init"])
            return state_of_params(run.config, partition.merge(drawn, given))

        params, meta = imported_params(run)
        state = jax.jit(with_params, out_shardings=shardings)(params)
        return Start(0, state, None, origin_of(meta) | _stops(run, meta))
    state = jax.jit(lambda: init_state(run.config, run.definition), out_shardings=shardings)()
    return Start(0, state, None, _stops(run, {}))


def _stops(run: Run, meta: dict[str, Any]) -> dict[str, Any]:
    """The tokens at which generation stops, where answers are trained: also the one that ends them."""
    tokenizer = run.prepared.tokenizer
    if not any(isinstance(plan, ChatPlanSpec) for plan in run.prepared.spec.plans.values()):
        return {}
    known = origin_of(meta).get("stop_ids", ())
    return {"stop_ids": sorted({*known, tokenizer.end_of_answer(tokenizer.chat_template)})}


def imported_params(run: Run) -> tuple[Params, dict[str, Any]]:
    """Reads the parameters of the run that `init_from` names, and the `meta` of their checkpoint.

    They are all of ours, but for adapters that it lacks.

    Raises:
      ConfigError: if there are none of this shape, it has adapters that we lack, or they were trained with another
        tokenizer.
    """
    folder = absolute(epath.Path(run.config.init_from))
    template, _ = abstract_inputs(run.config, run.definition, run.mesh)
    step, meta = read_meta(folder)
    lacking = _lacking_adapters(run, meta)
    wanted = partition.split(template.params, ",".join(lacking))[1] if lacking else template.params
    of_run = read_back(meta["config"])
    theirs = partition.stored_shapes(of_run, define(ModelConfig.of(of_run.model)), run.mesh)
    if any(is_quantized(x) for tree in (wanted, theirs) for x in jax.tree.leaves(tree, is_leaf=is_quantized)):
        restored = Restored(step, _converted(folder, step, wanted, theirs), meta)
    elif lacking:
        restored = Restored(step, restore_some_params(folder, wanted, step), meta)
    else:
        restored = restore_params(folder, wanted)
    if restored.meta["tokenizer"] != run.prepared.tokenizer_hash:
        raise ConfigError(
            f"init_from is {run.config.init_from}, whose tokenizer ({restored.meta['tokenizer'][:12]}) is not that of "
            f"{run.prepared.folder} ({run.prepared.tokenizer_hash[:12]}): name a run with the same tokenizer."
        )
    _log.info("starting from the parameters of %s at step %d", run.config.init_from, restored.step)
    _warn_of_another_decoder(run.config, restored.meta)
    return restored.state, restored.meta


def _converted(folder: epath.Path, step: int, wanted: Params, theirs: Params) -> Params:
    """Reads parameters one by one, each as it was saved, and quantizes it or takes it out of 4 bits.

    So a whole model never has to be there in float32.

    Args:
      folder: of the run.
      step: of the checkpoint.
      wanted: parameters as this run keeps them, as ShapeDtypeStructs that carry shardings.
      theirs: the same as the other run keeps them.
    """
    params: dict[tuple[str, ...], Any] = {}
    of_theirs = traverse_util.flatten_dict(theirs)
    for path, ours in traverse_util.flatten_dict(wanted).items():
        saved, whole = of_theirs.get(path), ours.codes if is_quantized(ours) else ours
        if not (is_quantized(saved) and saved.codes.shape == whole.shape):
            saved = jax.ShapeDtypeStruct(whole.shape, jnp.float32, sharding=whole.sharding)
        one = restore_some_params(folder, traverse_util.unflatten_dict({path: saved}), step)
        dtype = ours.kind if is_quantized(ours) else ours.dtype.name
        places = traverse_util.unflatten_dict({path: jax.tree.map(lambda x: x.sharding, ours)})
        cast = functools.partial(partition.cast, dtype=dtype)
        params |= traverse_util.flatten_dict(jax.jit(cast, out_shardings=places)(one))
    return traverse_util.unflatten_dict(params)


def _lacking_adapters(run: Run, meta: dict[str, Any]) -> list[str]:
    """The names of our adapters that a checkpoint with this `meta` has not.

    Raises:
      ConfigError: it has adapters that we lack, or of another rank.
    """
    of_checkpoint = ModelConfig.of(read_back(meta["config"]).model)
    theirs, ours = of_checkpoint.lora, run.definition.config.lora
    if theirs.layers and (theirs.rank != ours.rank or not set(theirs.layers) <= set(ours.layers)):
        raise ConfigError(
            f"init_from is {run.config.init_from}, whose adapters have model.lora.rank={theirs.rank} and "
            f"model.lora.targets={theirs.targets}, but this config has rank {ours.rank} and targets {ours.targets}: "
            "set the same, or name an import of what `meap_jax.convert export` merged."
        )
    shapes = traverse_util.flatten_dict(run.definition.shapes(), sep=".")
    known = traverse_util.flatten_dict(define(of_checkpoint).shapes(), sep=".")
    return [name for name in shapes if "_lora_" in name and name not in known]


def _warn_of_another_decoder(config: ml_collections.ConfigDict, meta: dict[str, Any]) -> None:
    """Says which fields let the same parameters compute something else; that may be wanted, as in a longer context."""
    old, new = (flatten(fields["model"]) for fields in (read_back(meta["config"]), config))
    changed = [name for name in OF_THE_DECODER if old[name] != new[name]]
    if not old["lora.rank"]:
        changed = [name for name in changed if name != "lora.alpha"]
    if changed:
        said = "; ".join(f"model.{name} was {old[name]!r} and is now {new[name]!r}" for name in changed)
        _log.warning("init_from is a model that computed otherwise: %s", said)


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
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found, "backend": jax.default_backend(), "meap_jax": __version__}
