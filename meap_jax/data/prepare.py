"""The former name of meap_jax.corpus.prepare, which this command still runs."""

import runpy
import sys

if __name__ == "__main__":
    print("python -m meap_jax.data.prepare is now python -m meap_jax.corpus.prepare", file=sys.stderr)
    runpy.run_module("meap_jax.corpus.prepare", run_name="__main__", alter_sys=True)
