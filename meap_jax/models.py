"""Opens a model apart from its data: from the workdir of a run, an imported folder, or a fresh config.

Such a folder holds `config.json`, `checkpoints/` and `tokenizer/`, the tokenizer's files, whose hash every checkpoint
names. An imported one has a checkpoint of parameters alone, at step 0.
"""

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh

from meap_jax import config as config_lib
from meap_jax import partition, sharding, tokenizers
from meap_jax.data.manifest import hash_of
from meap_jax.errors import ConfigError
from meap_jax.files import parse_json
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import Definition, Params, define
from meap_jax.objective import Objective, named_keys
from meap_jax.paths import write_whole
from meap_jax.quantization import dequantize, is_quantized
from meap_jax.restore import read_meta, restore_params, restore_some_params

CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "tokenizer"


class Model(NamedTuple):
    """A model without its parameters: its config, the mesh that it runs on, and what it computes."""

    config: ml_collections.ConfigDict
    mesh: Mesh
    definition: Definition


class OpenModel(NamedTuple):
    """A model with its parameters."""

    model: Model
    params: Params  # float32, laid out on the mesh.
    tokenizer: tokenizers.Tokenizer | None  # None: the config's is trained on its data, which was not opened.
    step: int  # That the parameters are of; 0 where nothing was trained.
    meta: dict[str, Any]  # Of the checkpoint; {} for a fresh model.


def define_model(
    config: ml_collections.ConfigDict, mesh: Mesh | None = None, devices: Sequence[jax.Device] | None = None
) -> Model:
    """Makes the definition and the mesh of a config; allocates nothing.

    Args:
      config: checked by `meap_jax.config.check`.
      mesh: takes the place of the config's.
      devices: that the config's mesh is made of; default: all of this process' backend.

    Raises:
      ConfigError: for a mesh that doesn't fit the devices, the batch or the model; an objective that isn't registered;
        parameters to train that aren't there.
    """
    mesh = sharding.make_mesh(config.mesh, devices) if mesh is None else mesh
    sharding.check_batch(mesh, config.global_batch_size, config.grad_accum_steps, config.seq_len)
    definition = define(ModelConfig.of(config.model, mesh.devices.flat[0].platform))
    definition.shardings(mesh)
    Objective.of(config)
    partition.split(definition.shapes(), config.trainable)
    return Model(config, mesh, definition)


def fresh_model(config: ml_collections.ConfigDict, mesh: Mesh | None = None) -> OpenModel:
    """Makes a model with parameters drawn from the seed of a config, as a run of it begins.

    Raises:
      ConfigError: as `define_model`, or for a tokenizer that can't be opened.
    """
    model = define_model(config, mesh)
    init = jax.jit(model.definition.init, out_shardings=model.definition.shardings(model.mesh))
    tokenizer = None if config.data.tokenizer == "bpe" else tokenizers.make(config.data.tokenizer)
    return OpenModel(model, init(named_keys(config)["init"]), tokenizer, 0, {})


def open_model(folder: epath.Path, step: int | None = None, mesh: Mapping[str, int] | None = None) -> OpenModel:
    """Opens the model of a run, or one that was imported; reads no data.

    Args:
      folder: absolute; see the module.
      step: of the checkpoint; default: the newest that can be read.
      mesh: sizes of its axes, in place of the config's.

    Raises:
      ConfigError: if the folder holds no such model, or one that doesn't fit the mesh.
    """
    model = _model_of(folder, mesh)
    restored = restore_params(folder, _placed_shapes(model), step)
    tokenizer = open_tokenizer(folder, restored.meta["tokenizer"])
    params = restored.state
    if any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        to_float32 = functools.partial(partition.cast, dtype="float32")
        params = jax.jit(to_float32, out_shardings=model.definition.shardings(model.mesh))(params)
    return OpenModel(model, params, tokenizer, restored.step, restored.meta)


def origin_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the import of a model said of it, or of the model that its training began from; {} for others.

    The keys are `family`, `dtype`, `adds_bos` (whether texts begin with the begin of a document) and `stop_ids`. A run
    that was trained on answers has the last of them whatever it began from.
    """
    return meta.get("imported") or meta.get("origin") or {}


def fingerprint(params: Params) -> str:
    """The SHA-256 of a corner of every parameter: two models that were trained apart differ in it, on any mesh.

    Args:
      params: of a model, whose values are the same on every mesh.
    """

    def corners(params: Params) -> list[jax.Array]:
        """The first layers, rows and columns: 4 of each axis."""
        return [x[tuple(slice(0, 4) for _ in x.shape)] for x in jax.tree.leaves(params)]

    mesh = jax.tree.leaves(params)[0].sharding.mesh
    digest = hashlib.sha256()
    for corner in jax.device_get(jax.jit(corners, out_shardings=sharding.replicated(mesh))(params)):
        digest.update(np.ascontiguousarray(corner).tobytes())
    return digest.hexdigest()


class StoredModel(NamedTuple):
    """A model whose parameters stay where they are stored, and are read one by one."""

    model: Model
    tokenizer: tokenizers.Tokenizer
    step: int
    meta: dict[str, Any]
    read: Callable[[tuple[str, ...]], jax.Array]  # (path of a parameter) -> the parameter, on the mesh.


def open_stored_model(
    folder: epath.Path, step: int | None = None, mesh: Mapping[str, int] | None = None
) -> StoredModel:
    """Opens a model as `open_model` does, but for its parameters."""
    model = _model_of(folder, mesh)
    step, meta = read_meta(folder, step)
    flat, shardings = map(traverse_util.flatten_dict, (_placed_shapes(model), model.definition.shardings(model.mesh)))

    def read(path: tuple[str, ...]) -> jax.Array:
        alone = traverse_util.unflatten_dict({path: flat[path]})
        return _as_numbers(traverse_util.flatten_dict(restore_some_params(folder, alone, step))[path], shardings[path])

    return StoredModel(model, open_tokenizer(folder, meta["tokenizer"]), step, meta, read)


def held_model(model: Model, params: Params, tokenizer: tokenizers.Tokenizer, step: int, meta: dict) -> StoredModel:
    """A model whose parameters are in memory, as `open_stored_model` gives one that is stored."""
    flat, shardings = map(traverse_util.flatten_dict, (params, model.definition.shardings(model.mesh)))
    return StoredModel(model, tokenizer, step, meta, lambda path: _as_numbers(flat[path], shardings[path]))


def _as_numbers(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.jit(dequantize, out_shardings=sharding)(x) if is_quantized(x) else x


def _model_of(folder: epath.Path, mesh: Mapping[str, int] | None) -> Model:
    config = read_config(folder)
    config.mesh.update(mesh or {})
    return define_model(config)


def _placed_shapes(model: Model) -> Params:
    """Parameters as ShapeDtypeStructs that carry shardings: float32, or quantized as they were saved."""
    shapes = partition.stored_shapes(model.config, model.definition, model.mesh)

    def as_read(x: Any) -> Any:
        return x if is_quantized(x) else x.update(dtype=jnp.float32)

    return jax.tree.map(as_read, shapes, is_leaf=is_quantized)


# --------------------------------------------------------------------------------------------------------------- files


def write_config(folder: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Writes a config into a model's folder."""
    write_whole(folder / CONFIG_FILE, json.dumps(config.to_dict(), indent=2))


def read_config(folder: epath.Path) -> ml_collections.ConfigDict:
    """Reads the config in a model's folder.

    Raises:
      ConfigError: if there is none, it is damaged, or another version wrote it.
    """
    file = folder / CONFIG_FILE
    try:
        return config_lib.read_back(parse_json(file.read_bytes()))
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} holds no {CONFIG_FILE}: name the workdir of a run.") from error
    except ConfigError as error:
        raise ConfigError(f"{file} {error}") from error
    except ValueError as error:
        raise ConfigError(
            f"{file} is damaged ({error}): start the run's training command again to write it."
        ) from error


def save_tokenizer(folder: epath.Path, tokenizer: tokenizers.Tokenizer) -> str:
    """Writes a tokenizer's files into a model's folder, in place of another's; returns their hash."""
    files, place = tokenizer.files(), folder / TOKENIZER_FOLDER
    wanted = dict(files)
    if tokenizer.chat_template:
        wanted[tokenizers.CHAT_TEMPLATE] = tokenizer.chat_template.encode()
    place.mkdir(parents=True, exist_ok=True)
    there = {path.name: path.read_bytes() for path in place.iterdir()}
    for name in there.keys() - wanted.keys():
        (place / name).unlink()
    for name, content in wanted.items():
        if there.get(name) != content:
            write_whole(place / name, content)
    return hash_of(files)


def open_tokenizer(folder: epath.Path, expected_hash: str) -> tokenizers.Tokenizer:
    """Opens the tokenizer in a model's folder.

    Raises:
      ConfigError: if it isn't there, or isn't the one that the model was trained with.
    """
    place = folder / TOKENIZER_FOLDER
    files = {path.name: path.read_bytes() for path in place.iterdir()} if place.exists() else {}
    if not files:
        raise ConfigError(
            f"{folder} holds no {TOKENIZER_FOLDER}/: a version before this one trained it; start its training command "
            "again, which writes the tokenizer beside the checkpoints."
        )
    found_hash = hash_of({name: content for name, content in files.items() if name != tokenizers.CHAT_TEMPLATE})
    if found_hash != expected_hash:
        raise ConfigError(
            f"{place} holds another tokenizer ({found_hash[:12]}) than the model was trained with "
            f"({expected_hash[:12]}): put the files of that one there, and nothing else."
        )
    with tempfile.TemporaryDirectory() as scratch:  # The folder may be a bucket's.
        for name, content in files.items():
            Path(scratch, name).write_bytes(content)
        return tokenizers.load(scratch)
