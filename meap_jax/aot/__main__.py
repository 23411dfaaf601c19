"""Compiles the training step for hardware that this machine lacks, and estimates its memory and its speed.

python -m meap_jax.aot --config=configs/meap_1b.py --topology=v5e:8x8 [--mesh=fsdp=64,tensor=1] [--slices=2]
    [--config.field=value ...]
python -m meap_jax.aot --config=configs/long_context_64k.py --topology=v5e:2x4 --generate=65024 [--mesh=...]

With --generate the programs of generation are compiled in the step's place: prefill of a prompt of so many tokens a
row, and decoding of 512 more; of these the memory is reported.

The last line of stdout is one JSON object. Memory, collectives and bytes are those of one device, FLOPs of the whole
step on all devices, times in seconds. The bounds are rooflines: a step can't be faster than its arithmetic at the
chip's peak, its memory traffic at full bandwidth or its collectives over all links, whichever takes longest.
"""

import json
import sys

from absl import flags

from meap_jax import cli
from meap_jax import config as config_lib
from meap_jax.aot.report import compile_for
from meap_jax.aot.targets import KNOWN
from meap_jax.errors import ConfigError


def command(argv: list[str]) -> None:
    """Compiles for the topology that the command line names."""
    values = flags.FlagValues()
    flags.DEFINE_string("topology", None, "Hardware to compile for.", flag_values=values)
    flags.DEFINE_string("mesh", None, "axis=size,...: replaces those axes of the config's mesh.", flag_values=values)
    flags.DEFINE_integer("generate", None, "Tokens of a prompt: compiles generation.", 1, flag_values=values)
    flags.DEFINE_integer("slices", 1, "TPU slices, joined by the data-centre network.", flag_values=values)
    try:
        rest = values(argv, known_only=True)
    except flags.Error as error:
        raise ConfigError(" ".join(str(error).split())) from error
    config, _ = cli.parse_config(rest, needs_data=False)
    config.mesh.update(cli.parse_mesh(values.mesh or ""))
    config_lib.check(config, needs_data=False)
    if values.topology is None:
        raise ConfigError(f"--topology is not set: name one of {KNOWN}.")
    report = compile_for(config, values.topology, values.slices, values.generate)
    sys.stdout.flush()
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    cli.run_command(command)
