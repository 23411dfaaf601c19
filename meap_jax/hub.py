"""Opens a model of the Hugging Face hub: a folder with config.json, safetensors and a tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from meap_jax import config as config_lib
from meap_jax.data.manifest import hash_of
from meap_jax.errors import DataError
from meap_jax.files import parse_json
from meap_jax.hf import config as hf_config
from meap_jax.hf import safetensors, weights
from meap_jax.hf.tokenizer import open_hub_tokenizer
from meap_jax.models import OpenModel, define_model
from meap_jax.tokenizers.interface import Tokenizer, round_up


def open_hub_model(
    source: Path,
    *,
    mask_init: str | None = None,
    seed: int = 0,
    ignore: tuple[str, ...] = (),
    mesh: Mapping[str, int] = MappingProxyType({}),
    keeps_dtype: bool = False,
) -> OpenModel:
    """Opens a model of the hub: reads its config, its tokenizer and, tensor by tensor, its weights.

    Args:
      source: a folder with config.json, safetensors and a tokenizer.
      mask_init: "mean" or "random", see `weights.fill_rows`; None: the mean, but a token that the tokenizer reserves
        keeps its row.
      seed: of random rows.
      ignore: fields of config.json that are not looked at.
      mesh: sizes of its axes; default: parameters are split over all devices.
      keeps_dtype: parameters have the dtype of the files; else float32.

    Raises:
      DataError, ConfigError: for what can't be read, or isn't such a model.
    """
    content = _read_json(source / "config.json")
    found = hf_config.read(content, ignore)
    tokenizer, adds_bos = open_hub_tokenizer(source)
    rows = found.model["vocab_size"]
    if tokenizer.num_own_ids > rows:
        raise DataError(
            f"{source} has a tokenizer of {tokenizer.num_own_ids} ids, but its embedding has {rows} rows: they are not "
            "of one model."
        )
    tensors = safetensors.Tensors(source)
    config = config_lib.base()
    has_own_mask = tokenizer.mask_id < tokenizer.num_own_ids
    config.model.update(found.model)
    config.model.update(**sizes(rows, tokenizer), dtype=hf_config.DTYPES[tensors.dtype()])
    config.seq_len, config.objective.mask_id = found.seq_len, tokenizer.mask_id
    config.data.tokenizer = "./tokenizer"
    config.global_batch_size = jax.device_count()
    config.mesh.update({"data": 1, "fsdp": -1, **mesh})
    config_lib.check(config, needs_data=False)
    model = define_model(config)
    dtype = tensors.dtype() if keeps_dtype else "float32"
    params = weights.load(tensors, model.definition, model.mesh, rows, dtype)
    is_filled = not has_own_mask or mask_init is not None
    own_rows = [tokenizer.mask_id] * (is_filled and tokenizer.mask_id < rows)
    weights.fill_rows(
        params, tensors, model.definition, model.mesh, rows, own_rows=own_rows, init=mask_init or "mean", seed=seed
    )
    imported = dict(
        family=found.family, dtype=tensors.dtype(), adds_bos=adds_bos, stop_ids=_stop_ids(source, content, rows)
    )
    meta = {"config": config.to_dict(), "tokenizer": hash_of(tokenizer.files()), "imported": imported}
    return OpenModel(model, params, tokenizer, 0, meta)


def sizes(rows: int, tokenizer: Tokenizer) -> dict[str, int]:
    """The fields of `model` for a vocabulary: rows of the files, and those that the tokenizer needs besides."""
    vocab_size = round_up(max(rows, tokenizer.num_tokens))
    return {"vocab_size": vocab_size, "num_tokens": max(rows, tokenizer.mask_id + 1)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}): --hf must be a folder of the hub.") from error
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {type(content).__name__}, but must hold an object.")
    return content


def _stop_ids(source: Path, content: dict[str, Any], rows: int) -> list[int]:
    """The tokens that end a text, as generation_config.json says or else config.json."""
    file = source / "generation_config.json"
    said = (_read_json(file) if file.is_file() else {}).get("eos_token_id", content.get("eos_token_id"))
    stops = said if isinstance(said, list) else [] if said is None else [said]
    if not all(isinstance(stop, int) and 0 <= stop < rows for stop in stops):
        raise DataError(f"{source} has eos_token_id {said}, but must have ids below {rows}.")
    return sorted(stops)
