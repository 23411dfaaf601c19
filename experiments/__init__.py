"""One file an experiment, and the report."""
