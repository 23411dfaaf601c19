"""Compilers for hardware that isn't there, which `make test-aot` installs; without them these tests are skipped."""

import pytest

from meap_jax.aot.targets import find_target
from meap_jax.errors import ConfigError


def target_or_skip(topology):
    try:
        return find_target(topology)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def tpu_compiler():
    target_or_skip("v5e:2x2")


@pytest.fixture
def gpu_compiler():
    target_or_skip("h100:8")
