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
import logging
from pathlib import Path
from typing import Any

import jax
from etils import epath

from meap_jax import cli
from meap_jax.checkpoint import save_params
from meap_jax.export import completed_folder, export_model
from meap_jax.hf import config as hf_config
from meap_jax.hub import open_hub_model
from meap_jax.models import save_tokenizer, write_config
from meap_jax.paths import absolute

_log = logging.getLogger("meap_jax.convert")


def import_model(source: Path, out: epath.Path, **options: Any) -> None:
    """Writes a model of the hub as a workdir; `options` are those of `open_hub_model`.

    Raises:
      DataError, ConfigError: as `open_hub_model`, or `out` exists.
    """
    with completed_folder(out) as partial:
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
