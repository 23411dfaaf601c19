"""Compilers for hardware that isn't there, which `make test-aot` installs; without them these tests are skipped."""

import pytest

from meap_jax.config import ConfigError
from meap_jax.targets import find_target


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
