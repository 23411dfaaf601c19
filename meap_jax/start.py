"""The state that a run starts from: restored, imported from another model, or drawn."""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath
from flax import traverse_util

from meap_jax import partition
from meap_jax.checkpoint import Checkpointer
from meap_jax.config import flatten, read_back
from meap_jax.data.spec import ChatPlanSpec
from meap_jax.errors import ConfigError
from meap_jax.model.config import ModelConfig, RopeScaling
from meap_jax.model.decoder import Params, define
from meap_jax.models import origin_of
from meap_jax.objective import named_keys
from meap_jax.paths import absolute
from meap_jax.quantization import is_quantized
from meap_jax.restore import Restored, read_meta, restore_params, restore_some_params
from meap_jax.run import Run
from meap_jax.train import TrainState, abstract_inputs, init_state, state_of_params

_log = logging.getLogger(__name__)

# Fields of `model` that shapes of parameters don't show.
OF_THE_DECODER = (
    "num_tokens", "rope_base", *(f"rope_scaling.{name}" for name in RopeScaling.__dataclass_fields__), "norm_eps",
    "window", "window_layers", "lora.alpha",
)  # fmt: skip


class Start(NamedTuple):
    """The state that a run starts from."""

    step: int
    state: TrainState
    data: dict[str, Any] | None  # State of the data iterator; None: from the first block.
    origin: dict[str, Any]  # What an import said of the model that training began from; where answers end.
    monitor: dict[str, Any] = {}  # State of `meap_jax.numerics.Monitor`.


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
        if restored.step > run.config.num_steps:
            raise ConfigError(
                f"num_steps is {run.config.num_steps}, but {run.workdir} has been trained for {restored.step} steps: "
                "set it to that or more, or name another --workdir."
            )
        if restored.step == run.config.num_steps:
            _log.info("nothing is left to do: num_steps is %d", run.config.num_steps)
        meta = restored.meta
        return Start(restored.step, restored.state, meta["data"], meta.get("origin", {}), meta.get("monitor", {}))
    return begin(run)


def begin(run: Run) -> Start:
    """Imports or draws the state before the first step."""
    template, _ = abstract_inputs(run.config, run.definition, run.mesh)
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
