"""Writes models in the form of the Hugging Face hub: whole, or the adapters of one alone as PEFT has them.

A folder is written beside its place and gets its name when it is complete.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import ml_collections
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from meap_jax import partition
from meap_jax.errors import ConfigError, DataError
from meap_jax.hf import adapter as hf_adapter
from meap_jax.hf import card, safetensors, weights
from meap_jax.hf import config as hf_config
from meap_jax.hf.tokenizer import hub_files
from meap_jax.model.decoder import Definition
from meap_jax.models import Model, StoredModel, open_stored_model, origin_of
from meap_jax.tokenizers import Tokenizer

_log = logging.getLogger(__name__)


def export_model(
    workdir: epath.Path,
    out: epath.Path,
    *,
    step: int | None = None,
    mesh: Mapping[str, int] = MappingProxyType({}),
    **options: Any,
) -> None:
    """Writes a model that was saved; see `export_stored`.

    Args:
      workdir: absolute, of a run or an imported model.
      out: that doesn't exist.
      step: of the checkpoint; default: the newest.
      mesh: sizes of its axes; default: parameters are split over all devices.
      options: of `export_stored`.

    Raises:
      ConfigError: no model is there; and as `export_stored`.
    """
    sizes = {"data": 1, "fsdp": -1, "tensor": 1, "context": 1, **mesh}
    export_stored(lambda: open_stored_model(workdir, step, sizes), workdir, out, **options)


def export_stored(
    opened: Callable[[], StoredModel],
    workdir: epath.Path,
    out: epath.Path,
    *,
    dtype: str | None = None,
    keep_padding: bool = False,
    largest_file: int = safetensors.LARGEST_FILE,
    adapter: str = "merge",
    base: str | None = None,
    replaces: bool = False,
) -> None:
    """Writes a model as a folder that transformers loads, or its adapters alone as one that PEFT loads.

    Args:
      opened: opens the model.
      workdir: that it is of, for its card.
      out: that doesn't exist, unless it is replaced.
      dtype: of the weights; default: that of the import, float32 for models that were trained here.
      keep_padding: rows of the vocabulary that no token has are written too.
      largest_file: bytes.
      adapter: "merge": weights are written with adapters in them; "peft": adapters are written, and nothing else.
      base: what "peft" says that adapters are added to: a name of the hub, or a folder.
      replaces: takes the place of a folder that is there.

    Raises:
      ConfigError: transformers can't express the model, `out` exists, or adapters are asked for alone and are not all
        that was trained.
    """
    with completed_folder(out, replaces) as partial:
        stored = opened()
        (config, placed_on, definition), tokenizer = stored.model, stored.tokenizer
        imported = origin_of(stored.meta)
        dtype = dtype or imported.get("dtype", "float32")
        model = definition.config
        rows = model.vocab_size if keep_padding else max(tokenizer.num_own_ids, tokenizer.mask_id + 1)
        if adapter == "peft":
            _check_adapters_are_all(config, definition)
            read, wanted, file, library = stored.read, hf_adapter.tensors(model), hf_adapter.FILE, "peft"
            files = {hf_adapter.CONFIG_FILE: _json(hf_adapter.config(model.lora, base))}
        else:
            read, wanted = hf_adapter.merged(stored.read, model.lora), weights.hub_tensors(model, rows)
            file, library, files = safetensors.FILE, "transformers", _model_files(stored, rows, dtype)
        files["README.md"] = card.text(workdir, config, stored.step, stored.meta, rows, library).encode()
        tensors = weights.outgoing(read, wanted, placed_on, dtype)
        if jax.process_index() == 0:
            safetensors.write(Path(partial), tensors, dtype, largest_file, file)
            for name, data in files.items():
                (Path(partial) / name).write_bytes(data)
        else:
            for tensor in tensors:
                for _ in tensor.blocks():
                    pass  # All processes run the programs that gather.
    what = f"adapters of rank {model.lora.rank}" if adapter == "peft" else f"{rows} rows of the vocabulary"
    _log.info("%s: %s, %s", out, what, dtype)


def check_export(model: Model, tokenizer: Tokenizer, adapter: str) -> None:
    """Stops a run whose model could not be written as `export_stored` does.

    Raises:
      ConfigError: transformers can't express it or its tokenizer, or adapters are asked for alone and are not all that
        is trained.
    """
    if adapter == "peft":
        _check_adapters_are_all(model.config, model.definition)
    else:
        hf_config.write(
            model.definition.config, model.config.seq_len, model.definition.config.vocab_size, "float32", None
        )
        hub_files(tokenizer, model.config.seq_len)


def _check_adapters_are_all(config: ml_collections.ConfigDict, definition: Definition) -> None:
    """Stops an export of adapters alone that would leave out something that was trained, or all.

    Raises:
      ConfigError: naming it.
    """
    if not definition.config.lora.rank:
        raise ConfigError(
            "adapters are to be written alone (peft), but the model has no adapters: its model.lora.rank is 0."
        )
    trained = traverse_util.flatten_dict(partition.split(definition.shapes(), config.trainable)[0], sep=".")
    others = [name for name in trained if "_lora_" not in name]
    if others:
        raise ConfigError(
            f"adapters are to be written alone (peft), but trainable is {config.trainable!r}, which trained "
            f"{', '.join(others)} too: write all of it merged (merge)."
        )


def _model_files(stored: StoredModel, rows: int, dtype: str) -> dict[str, bytes]:
    """What transformers reads beside the weights: {name: content}."""
    (config, _, definition), tokenizer, imported = stored.model, stored.tokenizer, origin_of(stored.meta)
    stops = sorted({tokenizer.eos_id, *imported.get("stop_ids", ())})
    ids: dict[str, Any] = dict(bos_token_id=tokenizer.bos_id, eos_token_id=stops if len(stops) > 1 else stops[0])
    if tokenizer.pad_id < rows:
        ids["pad_token_id"] = tokenizer.pad_id
    content = hf_config.write(definition.config, config.seq_len, rows, dtype, imported.get("family")) | ids
    return {
        "config.json": _json(content),
        # transformers' generate reads it; of [MASK] no other engine has to know, for the model never predicts it.
        "generation_config.json": _json(ids | {"suppress_tokens": [tokenizer.mask_id]}),
        **hub_files(tokenizer, config.seq_len),
    }


# ---------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def completed_folder(out: epath.Path, replaces: bool = False) -> Iterator[epath.Path]:
    """A folder beside `out` that gets its name if nothing goes wrong, and goes away otherwise.

    Raises:
      ConfigError: `out` exists, and is not to be replaced.
      DataError: it can't be written.
    """
    if out.exists() and not replaces:
        raise ConfigError(f"--out is {out}, which exists: name a folder that doesn't, or delete it.")
    partial = out.parent / f".{out.name}.partial"
    is_first = jax.process_index() == 0
    try:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        _wait("started")
        yield partial
        _wait("written")
        if is_first:
            shutil.rmtree(out, ignore_errors=True)
            os.replace(partial, out)
    except OSError as error:
        raise DataError(f"{out} can't be written: {error.strerror or error}.") from error
    finally:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)


def _wait(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _json(content: dict[str, Any]) -> bytes:
    return f"{json.dumps(content, indent=2)}\n".encode()
