"""The decoder, and the split of it into a static half (`Definition`) and a pytree of arrays (parameters).

The hot path sees parameters as plain nested dicts, their layers stacked [num_layers, ...], and `apply`, a pure
function.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from meap_jax import sharding
from meap_jax.losses import linear_cross_entropy, token_losses
from meap_jax.model.cache import Cache
from meap_jax.model.config import ModelConfig
from meap_jax.model.dropout import Dropout
from meap_jax.model.layers import Block, HasWindow, RMSNorm, input_std, linear, normal
from meap_jax.model.visibility import Visibility
from meap_jax.sharding import constrain

Params = dict[str, Any]
# (a layer, its input [B, T, D], whether it has the window) -> what is to be known of it, a pytree of arrays.
Look = Callable[[Block, jax.Array, HasWindow], Any]


class Decoder(nnx.Module):
    """Tokens to logits."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs, is_stacked: bool = True):
        self.config = c
        self.embedding = normal(rngs, (c.vocab_size, c.embed_dim), ("vocab", "embed"), input_std(c))

        @nnx.split_rngs(splits=c.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(c, rngs)

        self.layers = stacked(rngs) if is_stacked else nnx.List([Block(c, rngs) for _ in range(c.num_layers)])
        self.final_norm = RMSNorm(c)
        if not c.tie_embeddings:
            self.head = normal(rngs, (c.embed_dim, c.vocab_size), ("embed", "vocab"), input_std(c))

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        visibility: Visibility,
        keep_embedding_BT: Bool[Array, "B T"] | None = None,
        at_BN: Int[Array, "B N"] | None = None,
    ) -> Float[Array, "B N V"]:
        """Logits in the compute dtype.

        Args:
          tokens_BT: in [0, V).
          visibility: which keys each query sees, and the positions of RoPE.
          keep_embedding_BT: where it is False, the embedding is zero. Default: all are kept.
          at_BN: the positions whose logits are asked for, in [0, T); no others are computed. Default: all, N = T.
        """
        x_BTD = sharding.unzigzag(self.hidden(tokens_BT, visibility, keep_embedding_BT), context_shards())
        return self.logits(x_BTD, at_BN)

    def logits(self, x_BTD: Float[Array, "B T D"], at_BN: Int[Array, "B N"] | None = None) -> Float[Array, "B N V"]:
        """Logits of hidden states that are in the order of the text, at all positions or those of `at_BN`."""
        sequence = "sequence" if at_BN is None and x_BTD.shape[1] > 1 else None
        if at_BN is not None:
            x_BTD = jnp.take_along_axis(x_BTD, at_BN[..., None], axis=1)
        head = nnx.Param(self._head(), axes=("embed", "vocab"))
        return constrain(linear(x_BTD, head), "batch", sequence, "vocab")

    def _head(self) -> Float[Array, "D V"]:
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def loss(
        self,
        tokens_BT: Int[Array, "B T"],
        visibility: Visibility,
        targets_BT: Int[Array, "B T"],
        loss_weights_BT: Float32[Array, "B T"],
        keep_embedding_BT: Bool[Array, "B T"] | None = None,
        dropout: Dropout | None = None,
        **options: Any,
    ) -> Float32[Array, ""]:
        """Weighted sum of cross-entropies in nats, without logits of all positions; see `linear_cross_entropy`."""
        x_BTD = self.hidden(tokens_BT, visibility, keep_embedding_BT, dropout)
        targets_BT, loss_weights_BT = (sharding.zigzag(x, context_shards()) for x in (targets_BT, loss_weights_BT))
        num_tokens = self.config.num_tokens
        return linear_cross_entropy(x_BTD, self._head(), targets_BT, loss_weights_BT, num_tokens=num_tokens, **options)

    def token_losses(
        self,
        tokens_BT: Int[Array, "B T"],
        visibility: Visibility,
        targets_BT: Int[Array, "B T"],
        keep_embedding_BT: Bool[Array, "B T"] | None = None,
        **options: Any,
    ) -> Float32[Array, "B T"]:
        """The cross-entropy of every position in nats, without logits of all; see `losses.token_losses`."""
        x_BTD = self.hidden(tokens_BT, visibility, keep_embedding_BT)
        targets_BT, num_tokens = sharding.zigzag(targets_BT, context_shards()), self.config.num_tokens
        losses_BT = token_losses(x_BTD, self._head(), targets_BT, num_tokens=num_tokens, **options)
        return sharding.unzigzag(losses_BT, context_shards())

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        visibility: Visibility,
        keep_embedding_BT: Bool[Array, "B T"] | None = None,
        dropout: Dropout | None = None,
    ) -> Float[Array, "B T D"]:
        """What the head reads, in the order in which the devices of `context` hold the sequence."""
        x_BTD, _ = self._run_layers(tokens_BT, visibility, keep_embedding_BT, dropout, look=None)
        return self.final_norm(x_BTD)

    def observe(self, tokens_BT: Int[Array, "B T"], visibility: Visibility, look: Look) -> Any:
        """What `look` finds in each layer, stacked [num_layers, ...]; one layer is looked at at a time.

        On a mesh whose `context` is 1: a look sees whole sequences.
        """
        return self._run_layers(tokens_BT, visibility, None, None, look)[1]

    def _run_layers(
        self,
        tokens_BT: Int[Array, "B T"],
        visibility: Visibility,
        keep_embedding_BT: Bool[Array, "B T"] | None,
        dropout: Dropout | None,
        look: Look | None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The residual stream behind the last layer, and what `look` found in each."""
        c, shards = self.config, context_shards()
        tokens_BT = sharding.zigzag(tokens_BT, shards)
        positions_BT = sharding.zigzag(visibility.angles_at, shards)
        visibility = dataclasses.replace(visibility, rope_positions=None)  # Attention needs no angles.
        x_BTD = self.embedding[...].astype(c.dtype)[tokens_BT]
        if keep_embedding_BT is not None:
            x_BTD = x_BTD * sharding.zigzag(keep_embedding_BT, shards)[..., None].astype(c.dtype)
        if dropout is not None:
            positions_T = sharding.zigzag(jnp.arange(tokens_BT.shape[1])[None], shards)[0]
            x_BTD = dropout.drop(x_BTD, 0, positions_T)
        x_BTD = constrain(x_BTD, "batch", "sequence", None)

        block, weights = nnx.split(self.layers)
        is_mixed = len(set(c.has_window)) > 1
        windows = jnp.array(c.has_window) if is_mixed else None
        numbers = None if dropout is None else jnp.arange(c.num_layers)

        def layer(x_BTD: Float[Array, "B T D"], own: tuple[Any, Any, Any]) -> tuple[Float[Array, "B T D"], Any]:
            weights, has_window, number = own
            has_window = has_window if is_mixed else c.has_window[0]
            merged: Any = nnx.merge(block, weights)
            found = None if look is None else look(merged, x_BTD, has_window)
            drop = None if dropout is None else lambda y, i: dropout.drop(y, 1 + 2 * number + i, positions_T)
            x_BTD, _ = merged(x_BTD, positions_BT, visibility, has_window, drop=drop)
            return constrain(x_BTD, "batch", "sequence", None), found

        unroll = min(c.unroll, c.num_layers)
        return jax.lax.scan(remat(layer, c.remat), x_BTD, (weights, windows, numbers), unroll=unroll)

    def extend(
        self,
        tokens_BT: Int[Array, "B T"],
        visibility: Visibility,
        caches: Sequence[Cache],
        splits_sequence: bool = False,
    ) -> tuple[Float[Array, "B T D"], list[Any]]:
        """Hidden states of tokens that go on from those in the caches, and the caches with them in.

        For a decoder whose layers are not stacked: a decoding step reads every weight once, and slices of a stack
        would be copied first.

        Args:
          tokens_BT: in [0, V), in the order in which the devices of `context` hold them.
          visibility: the tokens' own, in the same order, with the positions of RoPE.
          caches: one for each layer.
          splits_sequence: over the devices of `context`; else each has all tokens.
        """
        c, sequence = self.config, "sequence" if splits_sequence else None
        x_BTD = constrain(self.embedding[...].astype(c.dtype)[tokens_BT], "batch", sequence, None)
        extended: list[Any] = []
        layers: Any = self.layers
        for block, has_window, cache in zip(layers, c.has_window, caches, strict=True):
            x_BTD, after = block(x_BTD, visibility.angles_at, visibility, has_window, cache)
            x_BTD = constrain(x_BTD, "batch", sequence, None)
            extended.append(after)
        return self.final_norm(x_BTD), extended


def context_shards() -> int:
    """Devices of the current mesh that share a sequence."""
    return sharding.shards_of(jax.sharding.get_abstract_mesh(), "context")


def remat(layer: Callable, policy: str) -> Callable:
    """Rematerialises a layer: its backward pass keeps what the policy says and computes the rest again.

    - none: everything is kept.
    - dots: the outputs of linear layers and of attention are kept.
    - full: its input alone is.
    - offload: its input alone, in the memory of the host.
    """
    if policy == "none":
        return layer
    policies = {
        # By name: JAX's policy for dots would keep the scores of attention that the xla backend multiplies.
        "dots": jax.checkpoint_policies.save_only_these_names("linear", "attention"),
        "full": None,
        "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["layer_input"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    return jax.checkpoint(layer, policy=policies[policy])


@dataclasses.dataclass(frozen=True)
class Definition:
    """The static half of a decoder: everything but its parameters' values."""

    config: ModelConfig
    graphdef: nnx.GraphDef
    is_stacked: bool = True  # Layers: one tree of arrays [num_layers, ...]. Else a tree for each, {0: ..., 1: ...}.

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh float32 parameters, as nested dicts."""
        # fold_in with a number that the stream of the other parameters, which counts from 0, never comes to.
        rngs = nnx.Rngs(params=key, lora=jax.random.fold_in(key, 2**31))
        return nnx.to_pure_dict(nnx.state(Decoder(self.config, rngs, self.is_stacked), nnx.Param))

    def decoder(self, params: Params) -> Decoder:
        """The decoder with these parameters, to be used within one traced function."""
        return nnx.merge(self.graphdef, params)

    def apply(self, params: Params, *args: Any, **kwargs: Any) -> Float[Array, "B N V"]:
        """Logits of tokens; see `Decoder.__call__`."""
        return self.decoder(params)(*args, **kwargs)

    def shapes(self) -> Params:
        """Parameters as ShapeDtypeStructs."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    def shardings(self, mesh: Mesh) -> Params:
        """The sharding of every parameter.

        Raises:
          ConfigError: if the mesh does not divide the model.
        """

        def place(x: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> NamedSharding:
            return NamedSharding(mesh, sharding.spec(mesh, x.shape, axes))

        return jax.tree.map(place, self.shapes(), self.axes())

    def axes(self) -> Params:
        """The logical axes of every parameter, a tuple of names in the place of each array."""
        abstract = nnx.eval_shape(lambda: Decoder(self.config, nnx.Rngs(0), self.is_stacked))

        def named(path: tuple[Any, ...], variable: nnx.Variable) -> tuple[str, ...]:
            return ("layers",) * (path[0] == "layers" and self.is_stacked) + variable.get_metadata("axes")

        flat = nnx.to_flat_state(nnx.state(abstract, nnx.Param))
        return traverse_util.unflatten_dict({path: named(path, variable) for path, variable in flat})


def define(config: ModelConfig, is_stacked: bool = True) -> Definition:
    """The decoder of this shape; allocates nothing."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), is_stacked)))
    return Definition(config, graphdef, is_stacked)


def unstack(params: Params) -> Params:
    """Parameters with a tree of arrays for each layer, {0: ..., 1: ...}, in place of arrays [num_layers, ...]."""
    num_layers = len(jax.tree.leaves(params["layers"])[0])
    layers = {i: jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(num_layers)}
    return params | {"layers": layers}
