"""What every test stands on: eight virtual CPU devices, one cache of compiled programs, one tiny decoder."""

import os
import tempfile
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

from meap_jax.config import base  # noqa: E402  After the environment is set.
from meap_jax.model.config import ModelConfig  # noqa: E402

hypothesis.settings.register_profile("meap-jax", derandomize=True, deadline=None)
hypothesis.settings.load_profile("meap-jax")


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    """A decoder with two of everything that can be two: 2 layers, 2 query heads a kv head, 2 kv heads."""
    c = base().model
    c.update(dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, embed_dim=32, mlp_dim=48, vocab_size=64))
    return ModelConfig.of(c, "cpu")
