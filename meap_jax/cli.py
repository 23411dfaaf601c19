"""What all commands share: flags to configs, help, the cache of compiled programs, and errors in one sentence."""

import errno
import inspect
import logging
import os
import re
import signal
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import jax
import ml_collections
from absl import flags
from absl import logging as absl_logging
from etils import epath
from ml_collections import config_flags

from meap_jax import config as config_lib
from meap_jax import peers
from meap_jax.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, ConfigError, Preempted, UserError
from meap_jax.fields import fields_of
from meap_jax.hosts import join_hosts
from meap_jax.paths import absolute, is_url
from meap_jax.sharding import AXES

SECONDS_AFTER_INTERRUPT = 10.0

_log = logging.getLogger(__name__)


def parse_config(argv: list[str], *, needs_data: bool = True) -> tuple[ml_collections.ConfigDict, epath.Path]:
    """Parses `--config=FILE [--config.field=value ...] [--workdir=DIR]` into (checked config, absolute workdir).

    Without `--workdir` it is `runs/` and the name of the config file. `needs_data=False` accepts a config whose
    `data.path` is not set yet.

    Raises:
      ConfigError: for anything that cannot be a run.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Where checkpoints and logs go; a folder or a bucket.", flag_values=values)
    config_flags.DEFINE_config_file("config", None, "A file in configs/.", flag_values=values, sys_argv=argv)
    try:
        _check_file(argv)
        rest = values(argv)
        if rest[1:]:
            raise ConfigError(f"{rest[1]!r} is not a flag: settings are given as --config.field=value.")
        if not values["config"].present:
            raise ConfigError("--config is not set: name a file, such as --config=configs/quickstart.py.")
        config = values.config
        if not isinstance(config, ml_collections.ConfigDict):
            kind = type(config).__name__
            raise ConfigError(f"get_config() in the file of --config returns {kind}, but must return a ConfigDict.")
        config_lib.check(config, needs_data=needs_data)
    except ConfigError:
        raise
    except (flags.Error, OSError) as error:
        if "Traceback (most recent call last)" in str(error):  # How a ValueError in the file comes.
            raise ConfigError(f"the file of --config can't be used: {str(error).strip().splitlines()[-1]}") from error
        raise ConfigError(_unparsed(error) or " ".join(str(error).split())) from error
    except Exception as error:  # A config file is a program: anything can go wrong in it.
        reason = f"the file of --config can't be used: {type(error).__name__}: " + str(error).partition("\n")[0]
        sentence = _unknown_field(error, argv) if isinstance(error, AttributeError | KeyError) else None
        raise ConfigError(sentence or reason) from error
    name = os.path.splitext(os.path.basename(config_flags.get_config_filename(values["config"])))[0]
    workdir = epath.Path(values.workdir or f"runs/{name}")
    return config, absolute(workdir)


def _check_file(argv: list[str]) -> None:
    """Stops where `--config` names no file: ml_collections would say so when a field is read."""
    for i, word in enumerate(argv):
        if not (found := re.fullmatch(r"--?config(?:=(.*))?", word, re.DOTALL)):
            continue
        path = found[1] if found[1] is not None else "".join(argv[i + 1 : i + 2])
        file = path.partition(":")[0]  # What is behind a colon is an argument of get_config.
        if not os.path.isfile(file):
            problem = "which is no file" if os.path.exists(file) else "which does not exist"
            raise ConfigError(f"--config is {path!r}, {problem}: name one such as configs/quickstart.py.")


def _unparsed(error: Exception) -> str | None:
    """One sentence about a setting whose text is not of its field's type, or None for another error."""
    kinds = {r"invalid literal for int\(": int, "Exceeds the limit": int, "could not convert": float, r"\('Non-b": bool}
    for reason, kind in kinds.items():
        if found := re.match(rf"flag --(?:config\.)?([^=]+)=(.*): {reason}", str(error), re.DOTALL):
            return f"{found[1]} is {config_lib.shown(found[2])}, but must be {config_lib.TYPES[kind]}."
    return None


def parse_mesh(text: str) -> dict[str, int]:
    """Parses the value of `--mesh=fsdp=64,tensor=1` into {axis: size}; "" names no axis.

    Raises:
      ConfigError: for anything else.
    """
    sizes = {}
    for entry in filter(None, text.split(",")):
        axis, _, size = entry.partition("=")
        if axis not in AXES or not re.fullmatch(r"-1|[1-9]\d*", size):
            raise ConfigError(
                f"--mesh is {text!r}, but must be axis=size,... with axes among {', '.join(AXES)} and sizes of 1 or "
                "more, or -1 for the devices that are left."
            )
        sizes[axis] = int(size)
    return sizes


def _unknown_field(error: AttributeError | KeyError, argv: list[str]) -> str | None:
    """One sentence where a field, or get_config itself, is not there; None for another error.

    ml_collections' message is the field alone, and on a second line perhaps the nearest one.
    """
    if "get_config" in str(error):
        return "the file of --config has no function get_config(), which must return the config."
    field, *hint = re.sub(r"""\\?'|^"|"$""", "", str(error)).replace("\\n", "\n").split("\n")
    typed = (re.match(rf"--?config\.(.*?\b{re.escape(field)})\b", word) for word in argv)
    path = next((match[1] for match in typed if match), field if isinstance(error, AttributeError) else None)
    return path and f"the config has no field {path!r}. {' '.join(hint)}".strip()


def help_on_fields() -> str:
    """Lists every field of a config with its default, what is valid and what it means."""
    fields = fields_of(["NAME"])
    defaults = {name: field.default for name, field in fields.items()}
    lines = ["Fields of the config, set with --config.FIELD=VALUE:"]
    for name, field in fields.items():
        value = "unset" if isinstance(field.default, type) else repr(field.default)
        valid = "; ".join(check.expected(defaults) for check in field.checks)
        lines += ["", f"  {name} = {value}" + (f", must be {valid}" if valid else "")]
        lines += textwrap.wrap(field.doc, 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def use_compile_cache() -> None:
    """Keeps compiled programs in a folder that all runs share, so that a program is compiled once.

    The folder is JAX_COMPILATION_CACHE_DIR, where an empty value means none; if it is not set, `meap_jax/xla` in
    XDG_CACHE_HOME or ~/.cache. It may be deleted at any time, and grows until it is. Processes can share it: an entry
    that is damaged, or being written by another, is compiled anew with a warning of JAX. Where the folder can't be
    written, nothing is kept.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(base, "meap_jax", "xla")
    if folder and not is_url(folder):
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            _log.info("compiled programs are not kept: %s can't be written (%s)", folder, error.strerror)
            folder = ""
    jax.config.update("jax_compilation_cache_dir", folder or None)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # JAX's own is 1: small programs count too.


def run_command(command: Callable[[list[str]], None], *, joins_hosts: bool = False) -> None:
    """Runs a command on sys.argv; a mistake of the user's ends in one sentence and exit code 1.

    Where the command's usage, the docstring of its module, has --config, `--help` prints it and every field.

    Args:
      command: called with sys.argv.
      joins_hosts: connect the processes of the run first, before anything else touches a device.
    """
    usage = sys.modules[command.__module__].__doc__ or ""
    if "--config=" in usage and not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        print(usage, help_on_fields(), sep="\n")
        return
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, force=True)
    logging.getLogger("meap_jax").setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax logs every detail at INFO.
    _mute_abandoned_reads()
    use_compile_cache()
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # As in the background of a shell.
        signal.signal(signal.SIGINT, _interrupt)
    try:
        with peers.telling(of_the_system, finishes=True):
            if joins_hosts:
                join_hosts()
            command(sys.argv)
    except UserError as error:
        fail(str(error))
    except Preempted as notice:
        print(f"preempted: {notice}; the same command goes on from there.", file=sys.stderr, flush=True)
        sys.exit(EXIT_PREEMPTED)
    except KeyboardInterrupt:
        sys.stdout.flush()
        print("stopped; what was saved is kept.", file=sys.stderr, flush=True)
        # At once: threads of libraries may be in the middle of something, and would end in a crash or a traceback.
        os._exit(EXIT_INTERRUPTED)
    except Exception as error:
        sentence = of_the_system(error)
        if sentence is None:
            raise
        fail(sentence)
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt; should something swallow it or take too long to clean up, the process ends anyway."""
    end = threading.Timer(SECONDS_AFTER_INTERRUPT, os._exit, (EXIT_INTERRUPTED,))
    end.daemon = True
    end.start()
    raise KeyboardInterrupt


def fail(sentence: str) -> NoReturn:
    """Ends the process with a sentence for its user and exit code 1."""
    sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(1)


def of_the_system(error: BaseException) -> str | None:
    """A sentence for what a full or faulty disk, or the like, made of a command; None for any other error.

    Libraries wrap such errors in their own, of which some keep nothing but the text.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        known = next((n for n in _OF_THE_SYSTEM if n == number or os.strerror(n) in str(seen)), None)
        if known is not None:
            path = getattr(seen, "filename", None)
            where = f"{path}: " if path else ""
            return (
                f"{where}{os.strerror(known)}. {_OF_THE_SYSTEM[known]}; the same command goes on from what was saved."
            )
        seen = seen.__cause__ or (seen.__context__ if isinstance(seen, OSError) else None)
    return None


_OF_THE_SYSTEM = {
    errno.ENOSPC: "Make room on that disk",
    errno.EDQUOT: "Make room, or ask for more",
    errno.EROFS: "Write to another place",
    errno.EACCES: "Write to another place, or as another user",
    errno.EIO: "See to the disk",
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
}


def _mute_abandoned_reads() -> None:
    """Keeps tracebacks from the log when a checkpoint is damaged, or can't be saved.

    Orbax raises the first read that failed, which we log in a line, and abandons the others: their failures would come
    as tracebacks, from asyncio's log, from tensorstore's threads ("Event loop is closed") or when Python collects the
    coroutines. Of a save that failed it logs the traceback in each thread that had to do with it, and raises it too.
    """
    logging.getLogger("absl").addFilter(lambda record: not record.exc_info)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def unless_abandoned(unraisable: Any) -> None:
        if not inspect.iscoroutine(unraisable.object) and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = unless_abandoned
