"""The decoder, and the split of it into a static half (`Definition`) and a pytree of arrays (parameters).

The hot path sees parameters as plain nested dicts, their layers stacked [num_layers, ...], and `apply`, a pure
function.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jaxtyping import Array, Bool, Float, Int, Key

from meap_jax.model.attention import Visibility
from meap_jax.model.config import ModelConfig
from meap_jax.model.layers import Block, RMSNorm, input_std, linear, normal
from meap_jax.sharding import constrain

Params = dict[str, Any]


class Decoder(nnx.Module):
    """Tokens to logits."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.config = c
        self.embedding = normal(rngs, (c.vocab_size, c.embed_dim), ("vocab", "embed"), input_std(c))

        @nnx.split_rngs(splits=c.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(c, rngs)

        self.layers = stacked(rngs)
        self.final_norm = RMSNorm(c)
        self.head = normal(rngs, (c.embed_dim, c.vocab_size), ("embed", "vocab"), input_std(c))

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        visibility: Visibility,
        keep_embedding_BT: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits in the compute dtype; where `keep_embedding` is False, a zero stands for the embedding."""
        c = self.config
        x_BTD = self.embedding[...].astype(c.dtype)[tokens_BT]
        if keep_embedding_BT is not None:
            x_BTD = x_BTD * keep_embedding_BT[..., None].astype(c.dtype)
        x_BTD = constrain(x_BTD, "batch", "sequence", None)

        block, weights = nnx.split(self.layers)

        def layer(x_BTD: Float[Array, "B T D"], layer_weights: Any) -> tuple[Float[Array, "B T D"], None]:
            return nnx.merge(block, layer_weights)(x_BTD, visibility), None

        body = jax.checkpoint(layer) if c.remat else layer
        x_BTD, _ = jax.lax.scan(body, x_BTD, weights, unroll=min(c.unroll, c.num_layers))
        logits_BTV = linear(self.final_norm(x_BTD), self.head)
        return constrain(logits_BTV, "batch", "sequence", "vocab")


@dataclasses.dataclass(frozen=True)
class Definition:
    """The static half of a decoder: everything but its parameters' values."""

    config: ModelConfig
    graphdef: nnx.GraphDef

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh float32 parameters, as nested dicts."""
        return nnx.to_pure_dict(nnx.state(Decoder(self.config, nnx.Rngs(params=key)), nnx.Param))

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        visibility: Visibility,
        keep_embedding: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of tokens; see `Decoder.__call__`."""
        return nnx.merge(self.graphdef, params)(tokens, visibility, keep_embedding)

    def shapes(self) -> Params:
        """Parameters as ShapeDtypeStructs."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def axes(self) -> Params:
        """The logical axes of every parameter, a tuple of names in the place of each array."""
        abstract = nnx.eval_shape(lambda: Decoder(self.config, nnx.Rngs(0)))

        def named(path: tuple[Any, ...], variable: nnx.Variable) -> tuple[str, ...]:
            stacked = ("layers",) if path[0] == "layers" else ()
            return stacked + variable.get_metadata("axes")

        flat = nnx.to_flat_state(nnx.state(abstract, nnx.Param))
        return traverse_util.unflatten_dict({path: named(path, variable) for path, variable in flat})


def define(config: ModelConfig) -> Definition:
    """The decoder of this shape; allocates nothing."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
    return Definition(config, graphdef)


def causal(tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None) -> Visibility:
    """Visibility of ordinary documents: causal within a segment, positions from 0 in each.

    Args:
      tokens: only their shape is read.
      segment_ids: equal ids side by side. Default: a row is one segment.
    """
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        return Visibility(jnp.ones_like(index), index)
    starts = segment_ids != jnp.roll(segment_ids, 1, axis=1).at[:, 0].set(-1)
    return Visibility(segment_ids, index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1))
