"""Converts models of the Hugging Face hub into ours, and back.

python -m meap_jax.convert import --hf=DIR --out=DIR [--mask_init=mean] [--seed=0] [--ignore=FIELD,...] [--mesh=fsdp=-1]
python -m meap_jax.convert export --workdir=DIR --out=DIR [--step=N] [--dtype=float32] [--keep_padding] [--mesh=fsdp=-1]
                                  [--adapter=merge|peft] [--base=NAME]

Import reads a folder with config.json, safetensors and a tokenizer, as the hub has it, of a Llama 2 or 3, a Mistral 7B
or a Qwen2 or 2.5. What it writes is a workdir like that of a run: `--config.init_from=` trains from it, and
`meap_jax.generate` continues texts with it. Export writes a folder that transformers loads; of a run that trained
adapters it merges them into the weights, or writes them alone, as PEFT has them. Either is written beside its place and
gets its name when it is complete.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import ml_collections
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from meap_jax import cli, partition
from meap_jax.checkpoint import save_params
from meap_jax.errors import ConfigError, DataError
from meap_jax.hf import adapter as hf_adapter
from meap_jax.hf import card, safetensors, weights
from meap_jax.hf import config as hf_config
from meap_jax.hf.tokenizer import hub_files
from meap_jax.hub import open_hub_model
from meap_jax.model.decoder import Definition
from meap_jax.models import StoredModel, open_stored_model, save_tokenizer, write_config
from meap_jax.paths import absolute

_log = logging.getLogger("meap_jax.convert")


def import_model(source: Path, out: epath.Path, **options: Any) -> None:
    """Writes a model of the hub as a workdir; `options` are those of `open_hub_model`.

    Raises:
      DataError, ConfigError: as `open_hub_model`, or `out` exists.
    """
    with _complete(out) as partial:
        # In their own dtype, which float32 holds exactly when they are opened: half the memory and half the disk.
        opened = open_hub_model(source, keeps_dtype=True, **options)
        tokenizer = opened.tokenizer
        if tokenizer is not None and jax.process_index() == 0:
            write_config(partial, opened.model.config)
            save_tokenizer(partial, tokenizer)
        meta = {"fingerprint": "", "data": None, **opened.meta}
        save_params(partial, opened.params, meta)
    number = opened.model.definition.config.num_parameters
    family, mask_id = opened.meta["imported"]["family"], opened.model.config.objective.mask_id
    _log.info("%s: %d parameters of a %s model; [MASK] is %d", out, number, family, mask_id)


def export_model(
    workdir: epath.Path,
    out: epath.Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    keep_padding: bool = False,
    mesh: Mapping[str, int] = MappingProxyType({}),
    largest_file: int = safetensors.LARGEST_FILE,
    adapter: str = "merge",
    base: str | None = None,
) -> None:
    """Writes a model as a folder that transformers loads, or its adapters alone as one that PEFT loads.

    Args:
      workdir: absolute, of a run or an imported model.
      out: that doesn't exist.
      step: of the checkpoint; default: the newest.
      dtype: of the weights; default: that of the import, float32 for models that were trained here.
      keep_padding: rows of the vocabulary that no token has are written too.
      mesh: sizes of its axes; default: parameters are split over all devices.
      largest_file: bytes.
      adapter: "merge": weights are written with adapters in them; "peft": adapters are written, and nothing else.
      base: what "peft" says that adapters are added to: a name of the hub, or a folder.

    Raises:
      ConfigError: no model is there, transformers can't express it, `out` exists, or adapters are asked for alone and
        are not all that was trained.
    """
    with _complete(out) as partial:
        stored = open_stored_model(workdir, step, {"data": 1, "fsdp": -1, "tensor": 1, "context": 1, **mesh})
        (config, placed_on, definition), tokenizer = stored.model, stored.tokenizer
        imported = stored.meta.get("imported", {})
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


def _check_adapters_are_all(config: ml_collections.ConfigDict, definition: Definition) -> None:
    """Stops an export of adapters alone that would leave out something that was trained, or all.

    Raises:
      ConfigError: naming it.
    """
    if not definition.config.lora.rank:
        raise ConfigError("--adapter is peft, but the model has no adapters: its model.lora.rank is 0.")
    trained = traverse_util.flatten_dict(partition.split(definition.shapes(), config.trainable)[0], sep=".")
    others = [name for name in trained if "_lora_" not in name]
    if others:
        raise ConfigError(
            f"--adapter is peft, but trainable is {config.trainable!r}, which trained {', '.join(others)} too: write "
            "all of it with --adapter=merge."
        )


def _model_files(stored: StoredModel, rows: int, dtype: str) -> dict[str, bytes]:
    """What transformers reads beside the weights: {name: content}."""
    (config, _, definition), tokenizer, imported = stored.model, stored.tokenizer, stored.meta.get("imported", {})
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
def _complete(out: epath.Path) -> Iterator[epath.Path]:
    """A folder beside `out` that gets its name if nothing goes wrong, and goes away otherwise."""
    if out.exists():
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
            os.replace(partial, out)
    except OSError as error:
        raise DataError(f"--out is {out}, which can't be written: {error.strerror or error}.") from error
    finally:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)


def _wait(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _json(content: dict[str, Any]) -> bytes:
    return f"{json.dumps(content, indent=2)}\n".encode()


# -------------------------------------------------------------------------------------------------------------- command


def command(argv: list[str]) -> None:
    """Imports or exports, as the command line says."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m meap_jax.convert", description=__doc__, formatter_class=form)
    ways = parser.add_subparsers(dest="way", required=True, metavar="import|export")
    reading = ways.add_parser("import", help="from the hub's form to ours")
    reading.add_argument("--hf", required=True, help="folder with config.json, safetensors and a tokenizer")
    reading.add_argument("--mask_init", choices=("mean", "random"), help="of the row of [MASK]; default: mean, but the "
                         "row of a token that the tokenizer reserves stays")  # fmt: skip
    reading.add_argument("--seed", type=int, default=0, help="of random rows")
    reading.add_argument("--ignore", default="", help="fields of config.json that are known to change nothing")
    writing = ways.add_parser("export", help="from ours to the hub's form")
    writing.add_argument("--workdir", required=True, help="of a run, or of an imported model")
    writing.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    writing.add_argument("--dtype", choices=tuple(hf_config.DTYPES), help="of the weights; default: that of the "
                         "import, float32 for models trained here")  # fmt: skip
    writing.add_argument("--keep_padding", action="store_true", help="writes rows of the vocabulary without a token")
    writing.add_argument("--adapter", choices=("merge", "peft"), default="merge", help="what becomes of adapters: "
                         "merge (default): weights are written with them; peft: they are written alone")  # fmt: skip
    writing.add_argument(
        "--base", help="what --adapter=peft says that they are added to: a name of the hub, or a folder"
    )
    for way in (reading, writing):
        way.add_argument("--out", required=True, help="folder that doesn't exist yet")
        way.add_argument("--mesh", default="", help="axis=size,...; default: fsdp=-1")
    args = parser.parse_args(argv[1:])
    out, mesh = absolute(epath.Path(args.out)), cli.parse_mesh(args.mesh)
    if args.way == "import":
        ignore = tuple(filter(None, args.ignore.split(",")))
        source = Path(args.hf).expanduser()
        import_model(source, out, mask_init=args.mask_init, seed=args.seed, ignore=ignore, mesh=mesh)
    else:
        workdir = absolute(epath.Path(args.workdir))
        export_model(
            workdir, out, step=args.step, dtype=args.dtype, keep_padding=args.keep_padding, mesh=mesh,
            adapter=args.adapter, base=args.base,
        )  # fmt: skip


if __name__ == "__main__":
    cli.run_command(command, joins_hosts=True)
