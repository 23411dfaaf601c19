"""Weights in 4 bits: quantized and read back by the package qwix, which is needed for nothing else.

A weight is cut into tiles along what a linear layer sums over; each tile has a scale, and each number a code of 4 bits.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from meap_jax.errors import ConfigError

KINDS = ("int4", "nf4")  # Evenly spaced codes; codes at the quantiles of a normal distribution (QLoRA's).
TILE = 64  # Numbers that share a scale, or a divisor of it: 4 bits and 32 / 64 a number.


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=("kind",))
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight in 4 bits; a pytree whose arrays have the axes of the weight."""

    codes: Any  # int4 of the weight's shape.
    scale: Any  # float32; along one axis a number for each tile.
    kind: str  # Of `KINDS`.

    def __getitem__(self, index: Any) -> "Quantized":
        """A part along axes that are not tiled, such as a layer."""
        return jax.tree.map(lambda x: x[index], self)


def is_quantized(x: Any) -> bool:
    """Whether a leaf of parameters is in 4 bits: `is_leaf` of jax.tree.map over them."""
    return isinstance(x, Quantized)


def quantize(weight: jax.Array, kind: str, axis: int) -> Quantized:
    """Gives each tile a scale and each number its nearest code, a layer at a time.

    Args:
      weight: [num_layers, ...] floats.
      kind: of `KINDS`.
      axis: without that of layers, along which tiles are.

    Raises:
      ConfigError: qwix is not installed.
    """
    qwix, tiles = _qwix(), {axis: math.gcd(weight.shape[axis + 1], TILE)}

    def one(layer: jax.Array) -> Quantized:
        others = [i for i in range(layer.ndim) if i != axis]
        found = qwix.quantize(layer.astype(jnp.float32), kind, channelwise_axes=others, tiled_axes=tiles)
        # As int4 whatever they mean: checkpoints know no uint4.
        return Quantized(jax.lax.bitcast_convert_type(found.qvalue, jnp.int4), found.scale, kind)

    return jax.lax.map(one, weight)


def dequantize(weight: Quantized, dtype: Any = jnp.float32) -> jax.Array:
    """The numbers that codes and scales stand for, computed in float32."""
    qwix = _qwix()
    stored = jnp.uint4 if weight.kind == "nf4" else jnp.int4
    codes = jax.lax.bitcast_convert_type(weight.codes, stored)
    return qwix.dequantize(qwix.QArray(codes, weight.scale, None, weight.kind)).astype(dtype)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ConfigError(
            f"frozen_dtype is {' or '.join(KINDS)}, which needs the package qwix: pip install -r "
            "requirements-qlora.txt, or set it to bfloat16."
        ) from error
    return qwix
