"""What all tests share: eight virtual CPU devices, one cache of compiled programs, one tiny decoder."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# JAX reads these when it is imported, so they come first; subprocesses inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile far more than they compute: code that LLVM does not optimize is there in half the time.
for _flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
# Workers, subprocesses and the next call share what was compiled.
_CACHE = Path(tempfile.gettempdir()) / f"meap-jax-tests-{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import fsspec  # noqa: E402  After the environment is set, as is all that follows.
import jax  # noqa: E402
from etils import epath  # noqa: E402
from fsspec.registry import _registry as implementations  # noqa: E402

from meap_jax.model.config import ModelConfig  # noqa: E402
from tiny_runs import ROOT, environment, tiny_config  # noqa: E402

jax.devices()  # Starts JAX with eight of them, before a test sets XLA_FLAGS for the processes that it starts.
hypothesis.settings.register_profile("meap-jax", derandomize=True, deadline=None)
hypothesis.settings.load_profile("meap-jax")


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    """A decoder with two of everything that can be two: 2 layers, 2 query heads a kv head, 2 kv heads."""
    return ModelConfig.of(tiny_config().model, "cpu")


@pytest.fixture
def bucket(monkeypatch) -> Iterator[epath.Path]:
    """A folder of gs://, served from memory through fsspec, as a real bucket is."""
    memory = fsspec.filesystem("memory")
    for protocol in ("gs", "gcs"):  # What `register_implementation` sets, and here takes back: other tests want none.
        monkeypatch.setitem(implementations, protocol, type(memory))
    yield epath.Path("gs://bucket/run")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.fixture
def one_device(monkeypatch):
    """Processes that a test's command starts see one device, not the eight of these tests."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
