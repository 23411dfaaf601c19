"""The command line of every door: flags in, one clear sentence out when something is wrong."""

import logging
import os
import sys
from collections.abc import Callable

import jax
import ml_collections
from absl import flags
from absl import logging as absl_logging
from etils import epath
from ml_collections import config_flags

from meap_jax import config as config_lib
from meap_jax.config import ConfigError
from meap_jax.data.documents import DataError
from meap_jax.train import Diverged

USER_ERRORS = (ConfigError, DataError, Diverged)


def parse_config(argv: list[str]) -> tuple[ml_collections.ConfigDict, epath.Path]:
    """`--config=FILE [--config.field=value ...] [--workdir=DIR]` -> (checked config, absolute workdir).

    Without `--workdir` it is `runs/` and the name of the config file.

    Raises:
      ConfigError: for anything that cannot be a run.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Where checkpoints and logs go; a folder or a bucket.", flag_values=values)
    config_flags.DEFINE_config_file("config", None, "A file in configs/.", flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)
        if rest[1:]:
            raise ConfigError(f"{rest[1]!r} is not a flag: settings are given as --config.field=value.")
        if values["config"].value is None:
            raise ConfigError("--config is not set: name a file, such as --config=configs/quickstart.py.")
        config = values.config
        config_lib.check(config)
    except ConfigError:
        raise
    except AttributeError as error:
        field, *hint = str(error).strip("'\"").replace("\\'", "").replace("\\n", "\n").split("\n")
        raise ConfigError(f"the config has no field {field.strip(chr(39))!r}. {' '.join(hint)}".strip()) from error
    except (flags.Error, OSError, ImportError, SyntaxError, KeyError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    name = os.path.splitext(os.path.basename(config_flags.get_config_filename(values["config"])))[0]
    workdir = epath.Path(values.workdir or f"runs/{name}")
    return config, workdir if "://" in str(workdir) else workdir.expanduser().resolve()


def join_hosts() -> None:
    """Connects the processes of a run, if there are several.

    Either as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say, or as the cluster does (Cloud TPU,
    Slurm and others that `jax.distributed.initialize` knows).
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]), process_id=int(os.environ["JAX_PROCESS_ID"])
        )
        return
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError):
        pass  # No cluster: one process.


def run_command(command: Callable[[list[str]], None]) -> None:
    """Runs a door's command on sys.argv; a mistake of the user's ends in one sentence and exit code 1."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, force=True)
    logging.getLogger("meap_jax").setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells all it does at INFO.
    # Of a damaged checkpoint orbax raises the first failed read, which is told; asyncio would print the others' traces.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        command(sys.argv)
    except USER_ERRORS as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; start the same command again to go on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
