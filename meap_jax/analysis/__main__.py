"""Measures what models attend to: masked keys (the paper's Table 10), and segments of texts (Tables 16-18, Figure 6).

python -m meap_jax.analysis masked --ntp=DIR --meap=DIR --out=DIR [--seq_len=1024] [--num_sequences=500] [--text=PATH]
    [--mask_ratio=0.15] [--seed=0] [--layers=all] [--mesh=data=-1]
python -m meap_jax.analysis segments --workdir=DIR [--workdir=DIR ...] --out=DIR [--examples=FILE.jsonl]
    [--mesh=data=-1]

The DIR of a model is the workdir of a run, or what `python -m meap_jax.convert import` wrote. `masked` shows both
models the same sequences, clean and with gaps. `segments` takes four texts of its own, or a line of FILE for each: an
object with the strings before, answer, after, query and eos (empty: the tokenizer's own end of a document). The folder
--out gets JSON with everything, a page in Markdown and figures, when all is done. docs/attention.md says what is
measured.
"""

import argparse
from pathlib import Path

import jax
from etils import epath

from meap_jax import cli
from meap_jax.analysis import masked, report, shares
from meap_jax.errors import ConfigError
from meap_jax.paths import absolute


def command(argv: list[str]) -> None:
    """Runs the analysis that the command line names."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m meap_jax.analysis", description=__doc__, formatter_class=form)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="masked|segments")
    keys = kinds.add_parser("masked", help="score decay at masked keys, variance at unmasked ones")
    keys.add_argument("--ntp", required=True, help="workdir of the model that the paper shows clean inputs")
    keys.add_argument("--meap", required=True, help="workdir of the model that the paper shows masked inputs")
    keys.add_argument(
        "--seq_len", type=int, default=1_024, help="tokens a sequence; default: 1024, as the paper's first"
    )
    keys.add_argument("--num_sequences", type=int, default=500, help="default: 500, as the paper")
    keys.add_argument(
        "--text", help="a file, folder or pattern, as data.path; default: the documentation of this Python"
    )
    keys.add_argument("--mask_ratio", type=float, default=0.15, help="default: 0.15, as the paper")
    keys.add_argument("--seed", type=int, default=0, help="of the gaps")
    keys.add_argument("--layers", default="all", help="over which means go: all, or numbers from 0 on, such as 0,3")
    texts = kinds.add_parser("segments", help="shares of attention by segment of a text")
    texts.add_argument(
        "--workdir", required=True, action="append", help="of a model; others are compared with the first"
    )
    texts.add_argument(
        "--examples", help="JSONL with before, answer, after, query, eos; default: four texts of our own"
    )
    for kind in (keys, texts):
        kind.add_argument("--out", required=True, help="folder that doesn't exist yet")
        kind.add_argument("--mesh", default="", help="axis=size,...: in place of those axes of the models' meshes")
    args = parser.parse_args(argv[1:])
    mesh = cli.parse_mesh(args.mesh)
    with report.new_folder(Path(args.out).expanduser().resolve()) as folder:
        if args.kind == "masked":
            if not 0 <= args.seed < 2**32:
                raise ConfigError(f"--seed is {args.seed}, but must be in [0, 2^32).")
            folders = {name: absolute(epath.Path(getattr(args, name))) for name in ("ntp", "meap")}
            results = masked.analyse(
                folders, seq_len=args.seq_len, num_sequences=args.num_sequences, text=args.text,
                mask_ratio=args.mask_ratio, seed=args.seed, layers=args.layers, mesh=mesh,
            )  # fmt: skip
            write, page = report.write_masked, report.masked_page(results, report.PAPER.get(args.seq_len))
        else:
            workdirs = [absolute(epath.Path(workdir)) for workdir in args.workdir]
            if len(set(workdirs)) < len(workdirs):
                raise ConfigError("--workdir names a folder twice: name each model once.")
            results = shares.analyse(workdirs, shares.read_examples(args.examples), mesh)
            write, page = report.write_shares, report.shares_page(results)
        if jax.process_index() == 0:
            write(folder, results)
            print(page)


if __name__ == "__main__":
    cli.run_command(command, joins_hosts=True)
