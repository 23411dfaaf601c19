"""Splits parameters into those that an optimizer step changes and those that it leaves, and says how each is kept.

A parameter's name is its path with dots, such as layers.attn.q_proj. Gradients and moments exist for what trains only.
"""

import fnmatch
import math
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meap_jax.errors import ConfigError
from meap_jax.fields import LINEAR_LAYERS
from meap_jax.model.decoder import Definition, Params
from meap_jax.model.layers import NUM_INPUTS
from meap_jax.quantization import KINDS, Quantized, dequantize, is_quantized, quantize


def split(params: Params, trainable: str) -> tuple[Params, Params]:
    """Divides parameters into those that train and those that don't.

    Args:
      params: nested dicts; the leaves may be anything.
      trainable: globs of names, such as "layers.attn.*,head"; "*" is all.

    Returns:
      Two trees of nested dicts that have no leaf in common; `merge` joins them again.

    Raises:
      ConfigError: a glob that no name matches.
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    chosen: set[str] = set()
    for glob in map(str.strip, trainable.split(",")):
        found = fnmatch.filter(flat, glob)
        if not found:
            raise ConfigError(
                f"trainable is {trainable!r}, but {glob!r} matches no parameter: they are {', '.join(flat)}."
            )
        chosen.update(found)
    trained = {name: leaf for name, leaf in flat.items() if name in chosen}
    frozen = {name: leaf for name, leaf in flat.items() if name not in chosen}
    return traverse_util.unflatten_dict(trained, sep="."), traverse_util.unflatten_dict(frozen, sep=".")


def cast(params: Params, dtype: str) -> Params:
    """Gives parameters a dtype; int4 or nf4: the weights of linear layers, and bfloat16 all others.

    Raises:
      ConfigError: int4 or nf4, and qwix is not installed.
    """
    flat = traverse_util.flatten_dict(params)

    def one(name: str, x: jax.Array | Quantized) -> jax.Array | Quantized:
        if dtype in KINDS and name in LINEAR_LAYERS:
            is_there = isinstance(x, Quantized) and x.kind == dtype
            return x if is_there else quantize(one_float(x, "float32"), dtype, NUM_INPUTS.get(name, 1) - 1)
        return one_float(x, "bfloat16" if dtype in KINDS else dtype)

    def one_float(x: jax.Array | Quantized, dtype: str) -> jax.Array:
        return dequantize(x, dtype) if isinstance(x, Quantized) else x.astype(dtype)

    return traverse_util.unflatten_dict({path: one(path[-1], x) for path, x in flat.items()})


def stored(params: Params, config: ml_collections.ConfigDict) -> Params:
    """Parameters as a run keeps them: those that train in `optimizer.param_dtype`, the others in `frozen_dtype`."""
    trained, frozen = split(params, config.trainable)
    return merge(cast(trained, config.optimizer.param_dtype), cast(frozen, config.frozen_dtype))


def stored_shapes(config: ml_collections.ConfigDict, definition: Definition, mesh: Mesh) -> Params:
    """Parameters as a run keeps them, as ShapeDtypeStructs that carry shardings.

    The scales of a quantized weight are split as the weight is, but along an axis that has too few of them.
    """

    def place(x: jax.ShapeDtypeStruct, whole: NamedSharding) -> jax.ShapeDtypeStruct:
        def shards(axes: Any) -> int:
            return math.prod(mesh.shape[axis] for axis in np.atleast_1d(axes)) if axes else 1

        spec = [axes if size % shards(axes) == 0 else None for size, axes in zip(x.shape, whole.spec, strict=False)]
        return x.update(sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def place_all(x: Any, whole: NamedSharding) -> Any:
        return jax.tree.map(lambda part: place(part, whole), x)

    shapes = jax.eval_shape(lambda params: stored(params, config), definition.shapes())
    return jax.tree.map(place_all, shapes, definition.shardings(mesh), is_leaf=is_quantized)


def merge(trained: Params, frozen: Params) -> Params:
    """Joins the two trees that `split` gave."""
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen))
