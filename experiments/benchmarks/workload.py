"""The real train step of a config, with its state and a batch of random tokens, ready to be called again and again."""

import argparse
import importlib.util
from typing import Any, cast

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from meap_jax import config as config_lib
from meap_jax import sharding, train
from meap_jax.errors import ConfigError
from meap_jax.models import define_model
from meap_jax.rows import Row

# About 1, 10 and 50 million parameters; the vocabulary grows with the model, so that the tables don't outweigh it.
SIZES = {
    "tiny": dict(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, embed_dim=16, mlp_dim=24, vocab_size=64),
    "1M": dict(num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, embed_dim=128, mlp_dim=352, vocab_size=1024),
    "10M": dict(num_layers=8, num_heads=8, num_kv_heads=2, head_dim=32, embed_dim=256, mlp_dim=704, vocab_size=8192),
    "50M": dict(num_layers=12, num_heads=8, num_kv_heads=2, head_dim=64, embed_dim=512, mlp_dim=1408, vocab_size=16384),
}


def checked_sizes(args: argparse.Namespace) -> list[str]:
    """The sizes that --sizes names; with --quick the tiny one.

    Raises:
      ConfigError: for a size that isn't there, or if torch isn't and --no-torch was not given.
    """
    sizes = ["tiny"] if args.quick else args.sizes.split(",")
    for size in sizes:
        if size not in SIZES:
            raise ConfigError(f"--sizes is {args.sizes!r}, but must be some of {', '.join(SIZES)}.")
    if not args.no_torch and not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        raise ConfigError(
            "torch or transformers is not installed here: pip install -r requirements-parity.txt, or give --no-torch "
            "for our side alone."
        )
    return sizes


def config_of(size: str, *, seq_len: int, batch_size: int, **model: Any) -> ml_collections.ConfigDict:
    """NTP with a decoder of `SIZES`, else as in `config.base`; `model` replaces fields of it."""
    c = config_lib.base()
    c.model.update(SIZES[size] | model)
    c.seq_len, c.global_batch_size = seq_len, batch_size
    c.objective.name = "ntp"
    c.objective.mask_id = 3
    return c


def devices() -> list[jax.Device]:
    """All accelerators; of a CPU that pretends to be several devices one, which has all cores."""
    return jax.devices() if jax.default_backend() != "cpu" else jax.devices()[:1]


def make_mesh(config: ml_collections.ConfigDict) -> Mesh:
    """The mesh of a config on `devices()`."""
    return sharding.make_mesh(config.mesh, devices())


def random_tokens(config: ml_collections.ConfigDict, seed: int = 0) -> np.ndarray:
    """[B, T + 1] int32, uniform over the vocabulary: what a step costs doesn't depend on them."""
    shape = (config.global_batch_size, config.seq_len + 1)
    return np.random.default_rng(seed).integers(0, config.model.vocab_size, shape, np.int32)


class Workload:
    """A compiled train step and what it is called with."""

    def __init__(self, config: ml_collections.ConfigDict, batch: Row | None = None):
        """Compiles the step and draws the state and the batch on the mesh.

        Args:
          config: of the step.
          batch: of numpy arrays [B, T + 1]; default: random tokens.

        Raises:
          ConfigError: for a config that can't work.
        """
        config_lib.check(config, needs_data=False)
        self.config = config
        _, self.mesh, self.definition = define_model(config, devices=devices())
        _, abstract = train.abstract_inputs(config, self.definition, self.mesh)
        if batch is None:
            tokens = random_tokens(config)
            batch = Row(tokens, abstract.segment_ids and np.ones_like(tokens))
        self.batch = jax.tree.map(lambda rows, like: sharding.put_whole(like.sharding, rows), batch, abstract)
        with jax.set_mesh(self.mesh):
            shardings = train.state_shardings(config, self.definition, self.mesh)
            self.state = jax.jit(lambda: train.init_state(config, self.definition), out_shardings=shardings)()
            jitted = cast(jax.stages.Wrapped, train.compile_step(config, self.definition, self.mesh))
            self.program = jitted.lower(self.state, self.batch).compile()

    def step(self) -> train.Metrics:
        """One optimizer step, whose state takes the place of the one before; returns without waiting for it."""
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.program(self.state, self.batch)
        return metrics

    @property
    def num_tokens(self) -> int:
        """Of a step."""
        return self.config.global_batch_size * self.config.seq_len


def temp_bytes(program: jax.stages.Compiled) -> int:
    """What a compiled program needs beside its arguments and results, on one device."""
    analysis = program.memory_analysis()
    assert analysis is not None, "every backend of ours has a memory analysis"
    return analysis.temp_size_in_bytes
