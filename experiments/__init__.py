"""One file an experiment, and the report."""

import meap_jax as meap_jax  # First, so that Ctrl-C ends a command that still imports at once.
