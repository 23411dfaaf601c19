"""The tables of docs/performance.md: every size of the paper, compiled for slices that would train it.

python -m experiments.aot_table [100m 300m 500m 1b 1b-64k] > table.md
python -m experiments.aot_table sft_llama32_3b sft_llama3_8b sft_mistral_7b_v02 sft_qwen25_14b > table.md

A row comes out as soon as it is compiled, and its JSON report on stderr. NTP and MEAP differ in one mask that is drawn
once a step, so that one of them stands for both.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

import ml_collections

from configs import long_context_64k
from meap_jax import cli
from meap_jax.aot.report import compile_for
from meap_jax.config import fine_tuning, paper
from meap_jax.errors import ConfigError

TOPOLOGIES = {
    "100m": ("v5e:4x4", "v5p:2x2x1", "v6e:2x4", "h100:8"),
    "300m": ("v5e:4x4", "v5p:2x2x2", "v6e:4x4", "h100:8"),
    "500m": ("v5e:8x8", "v5p:2x2x4", "v6e:4x4", "h100:8"),
    "1b": ("v5e:8x8", "v5p:4x4x4", "v6e:8x8", "h100:8"),
    "1b-64k": ("v5e:8x8", "v5p:2x2x4", "v6e:4x4", "h100:8"),
    "sft_llama32_3b": ("v5e:4x4", "h100:8"),
    "sft_llama3_8b": ("v6e:4x4", "h100:8"),
    "sft_mistral_7b_v02": ("v5e:4x4", "h100:8"),
    "sft_qwen25_14b": ("v6e:4x4", "h100:8"),
}
HEADINGS = (
    "config",
    "topology",
    "mesh",
    "HBM a device, GiB",
    "fits",
    "compiled / model FLOPs",
    "step at least, s",
    "MFU at most",
    "bound by",
    "compile, s",
)


def config_of(name: str, topology: str) -> ml_collections.ConfigDict:
    """The paper's config of a size, or that of its extension to 64K tokens, with the same million tokens a step."""
    if name.startswith("sft_"):
        return fine_tuning(name.removeprefix("sft_"), "meap")
    if name != "1b-64k":
        return paper(name, "meap")
    config = long_context_64k.get_config()
    if topology.startswith("h100"):  # Four TPUs share a sequence. cuDNN's kernel takes whole ones, two for each GPU.
        config.mesh.context, config.grad_accum_steps = 1, 2
    return config


def row(size: str, topology: str, report: Mapping[str, Any]) -> list[str]:
    """One report as cells; a dash where a program did not fit and so has no figures."""
    mesh = " ".join(f"{axis}={n}" for axis, n in report["mesh"].items() if n > 1) or "one device"
    memory = f"{report['hbm_bytes']['total'] / 2**30:.1f} of {report['hbm_capacity'] / 2**30:.0f}"
    cells = [
        size if size.startswith("sft_") else f"meap_{size}",
        topology,
        mesh,
        memory,
        "yes" if report["fits"] else "no",
    ]
    if report["roofline"] is None:
        figures = ["-"] * 4
    else:
        figures = [
            f"{report['compiled_over_model_flops']:.2f}",
            f"{report['step_seconds']:.3f}",
            f"{report['mfu_bound']:.0%}",
            max(report["roofline"], key=report["roofline"].__getitem__),
        ]
    return [*cells, *figures, f"{report['compile_seconds']:.0f}"]


def command(argv: list[str]) -> None:
    """Compiles the sizes that are named, or all of them, and prints the table."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m experiments.aot_table", description=__doc__, formatter_class=form)
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"{', '.join(TOPOLOGIES)}; default: all")
    sizes = parser.parse_args(argv[1:]).sizes or list(TOPOLOGIES)
    for size in sizes:
        if size not in TOPOLOGIES:
            raise ConfigError(f"{size!r} is not a size: name any of {', '.join(TOPOLOGIES)}.")
    print(f"| {' | '.join(HEADINGS)} |\n|{' --- |' * len(HEADINGS)}", flush=True)
    for size in sizes:
        for topology in TOPOLOGIES[size]:
            report = compile_for(config_of(size, topology), topology)
            print(json.dumps({"size": size} | report), file=sys.stderr, flush=True)
            print(f"| {' | '.join(row(size, topology, report))} |", flush=True)


if __name__ == "__main__":
    cli.run_command(command)
