"""MEAP and NTP: pre-training, evaluation and analysis in JAX."""

import signal
import sys

__version__ = "0.1.0"

# While `python -m meap_jax.COMMAND` looks for its module, sys.argv[0] is "-m"; then it imports libraries for seconds.
# Ctrl-C ends it at once there: as an exception it would come up somewhere in a library, and some swallow it.
_is_command = sys.argv[:1] == ["-m"] and any(word.startswith(("meap_jax", "experiments")) for word in sys.orig_argv)
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
