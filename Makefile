# `make` alone lists the targets. PYTHON=/path/or/name chooses the interpreter of .venv.

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-faults test-data test-parity test-aot test-cloud lint bench lock audit
.PHONY: .venv .beam .parity .cloud .audit
# Each recipe is one shell script that stops at its first failure.
.ONESHELL:
.SHELLFLAGS := -eu -c

# The folder of this file, so that `make -f /elsewhere/Makefile test` works like `make -C`.
ROOT := $(shell dirname '$(strip $(MAKEFILE_LIST))')

help: ## list the targets
	@cd "$(ROOT)"
	sed -n 's/^\([a-z.-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 14

# XLA's CPU backend asks for fresh buffers of tens of MB all the time, and first touching them in
# pages of 4 KB costs more than the arithmetic. The tunable makes glibc ask for huge pages.
quickstart: .venv ## train NTP and MEAP on this machine and write runs/quickstart/report.md
	@cd "$(ROOT)"
	GLIBC_TUNABLES=$${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} .venv/bin/python \
	    -m experiments.compare --config=configs/quickstart.py --workdir=runs/quickstart

# With the same setting, for our step and for torch's. BENCH=--quick shows in minutes that all of it runs.
bench: .venv ## print the tables of docs/performance.md, measured on this machine
	@cd "$(ROOT)"
	export GLIBC_TUNABLES=$${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
	torch=
	.venv/bin/python -c 'import torch, transformers' 2>/dev/null || {
	    torch=--no-torch
	    echo "Without PyTorch; for the comparison: .venv/bin/python -m pip install -r requirements-parity.txt"
	}
	.venv/bin/python -m experiments.benchmarks.train_step $$torch $(BENCH)
	.venv/bin/python -m experiments.benchmarks.generation $$torch $(BENCH)
	if .venv/bin/python -c 'import lm_eval' 2>/dev/null; then
	    .venv/bin/python -m experiments.benchmarks.lm_eval $$torch $(BENCH)
	fi
	datasets=
	.venv/bin/python -c 'import datasets' 2>/dev/null || datasets=--no-datasets
	.venv/bin/python -m experiments.benchmarks.corpus $$datasets $(BENCH)
	for name in masking population scaling data startup loss needles fine_tuning; do
	    .venv/bin/python -m experiments.benchmarks.$$name $(BENCH)
	done

test: .venv ## run the tests, on the CPU
	@cd "$(ROOT)"
	JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q -n 2 -m 'not slow' --ignore=tests/aot/compilers \
	    --ignore=tests/parity --ignore=tests/faults

# Some of them in minutes, with QUICK=1; all of them in about an hour.
test-faults: .venv ## kill runs, fill their disk and damage their files, and print what came of it
	@cd "$(ROOT)"
	export MEAP_JAX_OUTCOMES="$$PWD/runs/faults/outcomes.jsonl"
	rm -f "$$MEAP_JAX_OUTCOMES"
	JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q -rs -n 2 --dist=worksteal \
	    $(if $(QUICK),-m 'not slow' tests/faults,tests/faults tests/test_multihost.py)
	.venv/bin/python tests/faults/report.py

test-data: .beam ## tokenize with Apache Beam, and data sets of TFDS
	@cd "$(ROOT)"
	.beam/bin/python -c 'import apache_beam, tensorflow_datasets'
	JAX_PLATFORMS=cpu .beam/bin/python -m pytest -q -rs -n 2 tests/corpus/test_beam.py \
	    tests/readers/test_tfds.py tests/tokenizers/test_tokenizers.py

# The first line fails where tests would be skipped for want of what they compare with.
test-parity: .parity ## compare decoders, generation, lm-eval, the optimizer and a training step with PyTorch's
	@cd "$(ROOT)"
	.parity/bin/python -c 'import accelerate, datasets, lm_eval, peft, safetensors, torch, transformers'
	JAX_PLATFORMS=cpu .parity/bin/python -m pytest -q -rs -n 2 tests/parity

# The compilers are beside .venv and not in it: where libtpu is installed, jax looks for a TPU. .aot/stamp, written
# last, is what .venv/stamp is for .venv.
test-aot: .venv ## compile for TPUs and GPUs that are not here, and check what comes out
	@cd "$(ROOT)"
	wanted=$$(head -n 1 .venv/stamp; cat requirements-tpu-aot.txt requirements-gpu-aot.txt)
	if [ "$$(cat .aot/stamp 2>/dev/null)" != "$$wanted" ]; then
	    echo "Installing the compilers for TPUs and GPUs into .aot, about 2.2 GB, once"
	    rm -rf .aot
	    .venv/bin/python -m pip install --disable-pip-version-check --no-deps --target .aot \
	        -r requirements-tpu-aot.txt -r requirements-gpu-aot.txt
	    printf '%s\n' "$$wanted" > .aot/stamp
	fi
	PYTHONPATH="$$PWD/.aot$${PYTHONPATH:+:$$PYTHONPATH}" JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q -n 2 tests/aot/compilers

# SkyPilot has an environment of its own, since it shares nothing with ours but the files that it reads.
test-cloud: .cloud ## let SkyPilot read the task files of experiments/cloud
	@cd "$(ROOT)"
	.cloud/bin/python -c 'import sky'
	JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q -rs -n 0 tests/experiments/cloud

lint: .venv ## check style, types and the direction of imports
	@cd "$(ROOT)"
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	.venv/bin/python .venv/bin/lint-imports

# One file for Linux and Python 3.11 to 3.13 together: where these need different versions, a line ends in its marker.
# What is pinned stays pinned as long as requirements.txt allows it; LOCK=--upgrade takes the newest of everything.
lock: .audit ## pin requirements.txt and requirements-dev.txt with hashes, in requirements*.lock
	@cd "$(ROOT)"
	set -- --quiet --no-config --universal --python-version 3.11 --generate-hashes \
	    --custom-compile-command 'make lock' $(LOCK)
	.audit/bin/uv pip compile "$$@" requirements.txt -o requirements.lock
	.audit/bin/uv pip compile "$$@" -c requirements.lock requirements-dev.txt -o requirements-dev.lock

# --strict: what the database doesn't know, or can't be asked about, is a failure and no silence.
audit: .audit ## look for known vulnerabilities in what requirements-dev.lock pins; needs the network
	@cd "$(ROOT)"
	for version in 3.11 3.12 3.13; do
	    echo "Python $$version:"
	    .audit/bin/uv pip compile --quiet --no-config --no-deps --generate-hashes \
	        --python-version $$version requirements-dev.lock -o .audit/$$version.txt
	    .audit/bin/pip-audit --strict --disable-pip --require-hashes -r .audit/$$version.txt
	done

# .venv/stamp is written last: the interpreter, then the text of the requirements files. A .venv
#   with this very stamp      is used as it is,
#   with other requirements   is installed into again,
#   with another interpreter, or without a stamp since its install was cut short, is made anew.
.venv: ## install the requirements into .venv, if they are not there already
	@cd "$(ROOT)"
	fail() { printf '%s\n' "$$1" >&2; exit 1; }
	supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
	version='import sys; print("Python %d.%d.%d" % sys.version_info[:3])'
	identity='import os, sys; print(os.path.realpath(sys.base_prefix), sys.implementation.cache_tag)'

	# PYTHON; else the interpreter that made .venv; else the first one that will do.
	if [ -n "$${PYTHON:-}" ]; then
	    set -- "$$PYTHON"
	else
	    made_with=$$(sed -n 's/^executable = //p' .venv/pyvenv.cfg 2>/dev/null) || made_with=
	    set -- "$$made_with" python3 python3.13 python3.12 python3.11
	fi
	for python; do
	    if "$$python" -c "$$supported" 2>/dev/null; then break; fi
	    python=
	done
	if [ -z "$$python" ]; then
	    asked=$${PYTHON:-python3}
	    found=$$("$$asked" -c "$$version" 2>/dev/null) || found="no Python that runs"
	    fail "meap-jax needs Python 3.11, 3.12 or 3.13 and $$asked is $$found: name another with PYTHON=/path/to/python."
	fi

	interpreter=$$("$$python" -c "$$identity")
	wanted=$$(echo "$$interpreter"; cat requirements.txt requirements-dev.txt)
	if [ -x .venv/bin/python ] && [ "$$(cat .venv/stamp 2>/dev/null)" = "$$wanted" ]; then exit; fi

	if [ ! -x .venv/bin/python ] || [ "$$(head -n 1 .venv/stamp 2>/dev/null)" != "$$interpreter" ]; then
	    "$$python" -c 'import ensurepip, venv' 2>/dev/null ||
	        fail "$$python comes without venv: install it (Debian and Ubuntu: apt install python3-venv) or name another Python with PYTHON=/path/to/python."
	    echo "Making .venv with $$("$$python" -c "$$version"), about 1.5 GB, once"
	    "$$python" -m venv --clear .venv
	fi
	rm -f .venv/stamp
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	printf '%s\n' "$$wanted" > .venv/stamp

# .beam and .parity come before .venv on the path: what their requirements add, in other versions of some packages than
# .venv's where Apache Beam needs older ones, and all of .venv. Their stamps are like .venv/stamp, but with anything else
# written in them they are made anew.
.beam: .venv ## install requirements-beam.txt into .beam, if it is not there already
.parity: .venv ## install requirements-parity.txt into .parity, if it is not there already
.beam: size := 0.4 GB
.parity: size := 1.5 GB
.beam: older :=
.parity: older := requirements-transformers4.txt
.beam .parity:
	@cd "$(ROOT)"
	requirements=requirements-$(@:.%=%).txt
	older=$(older)
	wanted=$$(cat .venv/stamp $$requirements $$older)
	if [ "$$(cat $@/stamp 2>/dev/null)" = "$$wanted" ]; then exit; fi
	echo "Making $@, about $(size), once"
	.venv/bin/python -m venv --clear --without-pip $@ # .venv's pip does.
	packages='import sysconfig; print(sysconfig.get_path("purelib"))'
	.venv/bin/python -c "$$packages" > "$$($@/bin/python -c "$$packages")/venv.pth"
	$@/bin/python -m pip install --quiet --disable-pip-version-check -r $$requirements
	if [ -n "$$older" ]; then
	    $@/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@/transformers4 -r $$older
	fi
	printf '%s\n' "$$wanted" > $@/stamp

# Those that share nothing with .venv. Their stamps are like .venv/stamp, but with anything else written in them they are
# made anew.
.cloud: .venv ## install requirements-cloud.txt into .cloud, if it is not there already
.audit: .venv ## install requirements-audit.txt into .audit, if it is not there already
.cloud: size := 0.6 GB
.audit: size := 0.1 GB
.cloud .audit:
	@cd "$(ROOT)"
	requirements=requirements-$(@:.%=%).txt
	wanted=$$(head -n 1 .venv/stamp; cat $$requirements)
	if [ "$$(cat $@/stamp 2>/dev/null)" = "$$wanted" ]; then exit; fi
	echo "Making $@, about $(size), once"
	.venv/bin/python -m venv --clear $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check -r $$requirements
	printf '%s\n' "$$wanted" > $@/stamp
