"""Meshes of a few devices, and decoders all of whose weights matter."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from meap_jax import sharding


def mesh_of(**sizes):
    """A mesh of these sizes, 1 where none is given, on the first devices."""
    return sharding.make_mesh(dict.fromkeys(sharding.AXES, 1) | sizes, jax.devices()[: math.prod(sizes.values())])


def numbers(definition):
    """Parameters of every shape as declared, large enough that all of them matter; drawn by NumPy."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0.1, 0.3, p.shape), p.dtype), definition.shapes())
