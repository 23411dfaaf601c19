"""The modules of a decoder layer.

Every parameter is declared once: shape, logical axes (see `sharding.RULES`), initial std.
Names carry shapes: B batch, T sequence, D embed, H heads, K kv heads, d head_dim, F mlp.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from meap_jax.model.attention import attention
from meap_jax.model.cache import Cache
from meap_jax.model.config import ModelConfig
from meap_jax.model.rope import rope
from meap_jax.model.visibility import Visibility
from meap_jax.quantization import Quantized, dequantize
from meap_jax.sharding import constrain

# Known where the program is made, unless layers of both kinds share it: then it comes with each layer's weights.
HasWindow = bool | Bool[Array, ""]
# Dropout of what attention (0) or the mlp (1) adds to the residual stream.
Drop = Callable[[jax.Array, int], jax.Array]
NUM_INPUTS = {"o_proj": 2}  # Axes of a weight that are inputs, where it is not one.


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2)."""
    # Drawn flat: the same numbers, but XLA compiles a draw of three or four dimensions ten times slower.
    draw = jax.random.normal(rngs.params(), (math.prod(shape),), jnp.float32).reshape(shape)
    return nnx.Param(std * draw, axes=axes)


def input_std(c: ModelConfig) -> float:
    """Of embeddings and of linear layers that read the residual stream.

    Official (lit_gpt/model.py): N(0, 2 / (5 D)), a variance; "normal": 0.02.
    """
    return math.sqrt(2 / (5 * c.embed_dim)) if c.init == "official" else 0.02


def output_std(c: ModelConfig) -> float:
    """Of linear layers that write to the residual stream; official: 1 / sqrt(D) / L, "normal": 0.02 / sqrt(2 L)."""
    return c.embed_dim**-0.5 / c.num_layers if c.init == "official" else 0.02 / math.sqrt(2 * c.num_layers)


def linear(x: Float[Array, "B T *inputs"], weight: nnx.Param, num_inputs: int = 1) -> Float[Array, "B T *outputs"]:
    """Contracts the last `num_inputs` axes of x with the first of `weight`."""
    return checkpoint_name(matmul(x, weight, num_inputs), "linear")


def matmul(x: Float[Array, "B T *inputs"], weight: nnx.Param, num_inputs: int = 1) -> Float[Array, "B T *outputs"]:
    """`linear` whose output has no name for rematerialisation."""
    value, axes = weight[...], weight.get_metadata("axes")
    if not isinstance(value, Quantized):
        return _product(x, gathered(value.astype(x.dtype), axes), num_inputs)

    @jax.checkpoint  # The backward pass reads the 4 bits again, and keeps no copy in the compute dtype.
    def from_4_bits(x: jax.Array, value: Quantized) -> jax.Array:
        whole = dataclasses.replace(value, codes=constrain(value.codes, *_without_embed(axes)))  # Its scales follow.
        return _product(x, dequantize(whole, x.dtype), num_inputs)

    return from_4_bits(x, value)


def _product(x: Float[Array, "B T *inputs"], w: jax.Array, num_inputs: int) -> Float[Array, "B T *outputs"]:
    """As one 2-D matmul, XLA's fastest form on CPU."""
    inputs, outputs, lead = w.shape[:num_inputs], w.shape[num_inputs:], x.shape[: x.ndim - num_inputs]
    size = math.prod(inputs)
    return (x.reshape(-1, size) @ w.reshape(size, -1)).reshape(*lead, *outputs)


def add_adapters(module: nnx.Module, c: ModelConfig, rngs: nnx.Rngs) -> None:
    """Gives each linear layer of a module that `lora.targets` names two more weights, A: inputs -> rank -> outputs: B.

    A is drawn from U(-b, b) with b = 1 / sqrt(inputs), as PEFT draws it; B is 0, so that a fresh adapter adds nothing.
    They have a stream of random numbers of their own: all other parameters are drawn as they are without adapters.
    """
    for name in c.lora.layers:
        if not hasattr(module, name):
            continue
        weight, n, rank = getattr(module, name), NUM_INPUTS.get(name, 1), c.lora.rank
        axes, inputs, outputs = weight.get_metadata("axes"), weight.shape[:n], weight.shape[n:]
        bound = math.prod(inputs) ** -0.5
        a = jax.random.uniform(rngs.lora(), (math.prod(inputs) * rank,), jnp.float32, -bound, bound)
        setattr(module, f"{name}_lora_a", nnx.Param(a.reshape(*inputs, rank), axes=(*axes[:n], "rank")))
        setattr(module, f"{name}_lora_b", nnx.Param(jnp.zeros((rank, *outputs), jnp.float32), axes=("rank", *axes[n:])))


def adapted(module: Any, name: str, x: Float[Array, "B T *inputs"]) -> Float[Array, "B T *outputs"]:
    """The linear layer `name` of a module, with its adapter if it has one: x W + alpha / rank * (x A) B."""
    n = NUM_INPUTS.get(name, 1)
    out = matmul(x, getattr(module, name), n)
    if name in module.config.lora.layers:
        low_rank = linear(x, getattr(module, f"{name}_lora_a"), n)
        lora = module.config.lora
        out += lora.alpha / lora.rank * matmul(low_rank, getattr(module, f"{name}_lora_b"))
    return checkpoint_name(out, "linear")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(w: Float[Array, "..."], axes: tuple[str, ...]) -> Float[Array, "..."]:
    """A weight gathered along `embed`, which is split over fsdp; its gradient is split again.

    Left to itself, the partitioner for TPUs multiplies shard by shard while they travel, and adds up the products of a
    contracted axis in memory: on v5p that was half of all memory traffic of a step of the 481M decoder.
    """
    return constrain(w, *_without_embed(axes))


def _without_embed(axes: tuple[str, ...]) -> list[str | None]:
    return [None if axis == "embed" else axis for axis in axes]


gathered.defvjp(
    lambda w, axes: (gathered(w, axes), None),
    lambda axes, _, d_w: (constrain(d_w, *axes),),
)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32."""

    def __init__(self, c: ModelConfig):
        self.scale = nnx.Param(jnp.ones(c.embed_dim, jnp.float32), axes=("norm",))
        self.eps = c.norm_eps

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...]).astype(x_BTD.dtype)


class Attention(nnx.Module):
    """Causal grouped-query self-attention with RoPE; with a window in the layers that have one."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        D, H, K, d = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        self.q_proj = normal(rngs, (D, H, d), ("embed", "heads", "head_dim"), input_std(c))
        self.k_proj = normal(rngs, (D, K, d), ("embed", "kv_heads", "head_dim"), input_std(c))
        self.v_proj = normal(rngs, (D, K, d), ("embed", "kv_heads", "head_dim"), input_std(c))
        self.o_proj = normal(rngs, (H, d, D), ("heads", "head_dim", "embed"), output_std(c))
        if c.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((H, d), jnp.float32), axes=("heads", "head_dim"))
            self.k_bias = nnx.Param(jnp.zeros((K, d), jnp.float32), axes=("kv_heads", "head_dim"))
            self.v_bias = nnx.Param(jnp.zeros((K, d), jnp.float32), axes=("kv_heads", "head_dim"))
        add_adapters(self, c, rngs)
        self.config = c

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        visibility: Visibility,
        has_window: HasWindow,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        c = self.config
        q_BTHd, k_BTKd = self.queries_and_keys(x_BTD, positions_BT)
        v_BTKd = self._project(x_BTD, "v")

        def attend(visibility: Visibility) -> Float[Array, "B T H d"]:
            return attention(q_BTHd, k_BTKd, v_BTKd, visibility, implementation=c.attention)

        near = dataclasses.replace(visibility, window=c.window)
        if cache is not None:
            visibility = near if has_window is True else visibility
            out_BTHd, cache = cache.attend(q_BTHd, k_BTKd, v_BTKd, visibility, c.attention)
        elif isinstance(has_window, bool):
            out_BTHd = attend(near if has_window else visibility)
        else:
            out_BTHd = jax.lax.cond(has_window, lambda: attend(near), lambda: attend(visibility))
        return adapted(self, "o_proj", out_BTHd), cache

    def queries_and_keys(
        self, x_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T H d"], Float[Array, "B T K d"]]:
        """Queries and keys as attention compares them: with bias and RoPE, not yet divided by sqrt(head_dim)."""
        c = self.config
        q_BTHd, k_BTKd = (
            rope(self._project(x_BTD, name), positions_BT, c.rope_base, c.rope_scaling) for name in ("q", "k")
        )
        return q_BTHd, k_BTKd

    def _project(self, x_BTD: Float[Array, "B T D"], name: str) -> Float[Array, "B T N d"]:
        """Queries ("q"), keys ("k") or values ("v") with their bias."""
        x_BTNd = adapted(self, f"{name}_proj", x_BTD)
        return x_BTNd + getattr(self, f"{name}_bias")[...].astype(x_BTD.dtype) if self.config.qkv_bias else x_BTNd


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        D, F = c.embed_dim, c.mlp_dim
        self.gate_proj = normal(rngs, (D, F), ("embed", "mlp"), input_std(c))
        self.up_proj = normal(rngs, (D, F), ("embed", "mlp"), input_std(c))
        self.down_proj = normal(rngs, (F, D), ("mlp", "embed"), output_std(c))
        add_adapters(self, c, rngs)
        self.config = c

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden_BTF = jax.nn.silu(adapted(self, "gate_proj", x_BTD)) * adapted(self, "up_proj", x_BTD)
        return adapted(self, "down_proj", hidden_BTF)


class Block(nnx.Module):
    """Norm, attend, add; norm, mlp, add."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(c)
        self.attn = Attention(c, rngs)
        self.mlp_norm = RMSNorm(c)
        self.mlp = MLP(c, rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        visibility: Visibility,
        has_window: HasWindow,
        cache: Cache | None = None,
        drop: Drop | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        x_BTD = checkpoint_name(x_BTD, "layer_input")
        attended_BTD, cache = self.attn(self.attn_norm(x_BTD), positions_BT, visibility, has_window, cache)
        x_BTD = x_BTD + (attended_BTD if drop is None else drop(attended_BTD, 0))
        fed_BTD = self.mlp(self.mlp_norm(x_BTD))
        return x_BTD + (fed_BTD if drop is None else drop(fed_BTD, 1)), cache
