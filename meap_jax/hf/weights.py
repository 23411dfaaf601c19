"""Tensors of a transformers decoder as our parameters, and back, one tensor at a time.

A tensor goes from its file straight to the devices that hold it: each process reads the rows and columns of its own
devices alone.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from meap_jax import sharding
from meap_jax.errors import DataError
from meap_jax.hf.safetensors import Tensors
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import Definition, Params

# By our names within a layer. Matrices are [outputs, inputs] there and [inputs, outputs] here.
_LAYER = {
    ("attn_norm", "scale"): "input_layernorm.weight",
    ("attn", "q_proj"): "self_attn.q_proj.weight",
    ("attn", "k_proj"): "self_attn.k_proj.weight",
    ("attn", "v_proj"): "self_attn.v_proj.weight",
    ("attn", "q_bias"): "self_attn.q_proj.bias",
    ("attn", "k_bias"): "self_attn.k_proj.bias",
    ("attn", "v_bias"): "self_attn.v_proj.bias",
    ("attn", "o_proj"): "self_attn.o_proj.weight",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    ("mlp", "gate_proj"): "mlp.gate_proj.weight",
    ("mlp", "up_proj"): "mlp.up_proj.weight",
    ("mlp", "down_proj"): "mlp.down_proj.weight",
}
_TOP = {
    ("embedding",): "model.embed_tokens.weight",
    ("final_norm", "scale"): "model.norm.weight",
    ("head",): "lm_head.weight",
}
# Tensors that old checkpoints hold and nothing reads: RoPE's frequencies, which config.json gives.
_IGNORED = ".rotary_emb.inv_freq"


class HubTensor(NamedTuple):
    """One tensor of a checkpoint of transformers, and where it is among our parameters."""

    name: str
    shape: tuple[int, ...]  # As it is there.
    path: tuple[str, ...]  # Of our parameter.
    layer: int | None  # Of a parameter [num_layers, ...]; None: the whole parameter.
    own_shape: tuple[int, ...]  # As it is here, without the axis of layers.

    @property
    def num_inputs(self) -> int:
        """Axes of ours that are inputs: those of a matrix that is transposed; 0 where it is not."""
        if len(self.own_shape) == 1 or self.path[-1].endswith("bias") or self.path == ("embedding",):
            return 0
        return 2 if self.path[-1] == "o_proj" else 1


def hub_tensors(model: ModelConfig, num_rows: int) -> list[HubTensor]:
    """All tensors of a decoder in the order in which transformers writes them.

    Args:
      model: the decoder.
      num_rows: of embedding and head there.
    """
    D, H, K, d, F = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim, model.mlp_dim
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {
        ("embedding",): (num_rows, D), ("head",): (D, num_rows), ("final_norm", "scale"): (D,),
        ("attn_norm", "scale"): (D,), ("mlp_norm", "scale"): (D,),
        ("attn", "q_proj"): (D, H, d), ("attn", "k_proj"): (D, K, d), ("attn", "v_proj"): (D, K, d),
        ("attn", "q_bias"): (H, d), ("attn", "k_bias"): (K, d), ("attn", "v_bias"): (K, d),
        ("attn", "o_proj"): (H, d, D),
        ("mlp", "gate_proj"): (D, F), ("mlp", "up_proj"): (D, F), ("mlp", "down_proj"): (F, D),
    }  # fmt: skip

    def tensor(name: str, path: tuple[str, ...], layer: int | None) -> HubTensor:
        found = HubTensor(name, (), path, layer, shapes[path[1:] if layer is not None else path])
        n = found.num_inputs
        outer, inner = math.prod(found.own_shape[n:]), math.prod(found.own_shape[:n])
        there = (outer, inner) if n else found.own_shape if path == ("embedding",) else (outer,)
        return found._replace(shape=there)

    layers = [
        tensor(f"model.layers.{i}.{name}", ("layers", *path), i)
        for i in range(model.num_layers)
        for path, name in _LAYER.items()
        if model.qkv_bias or not name.endswith("bias")
    ]
    first, norm, head = (tensor(name, path, None) for path, name in _TOP.items())
    return [first, *layers, norm, *([] if model.tie_embeddings else [head])]


# -------------------------------------------------------------------------------------------------------------- import


def load(tensors: Tensors, definition: Definition, mesh: jax.sharding.Mesh, num_rows: int) -> Params:
    """Reads all parameters; those of ours that the checkpoint lacks, rows of the vocabulary from `num_rows` on, are 0.

    Args:
      tensors: of the checkpoint.
      definition: whose parameters are stacked.
      mesh: that they are laid out on.
      num_rows: of the checkpoint's embedding and head.

    Returns:
      float32 parameters.

    Raises:
      DataError: a tensor is missing, unknown, of another shape or dtype, or holds a number that is not finite.
    """
    wanted = hub_tensors(definition.config, num_rows)
    _check(tensors, wanted, definition.config)
    shardings = definition.shardings(mesh)
    zeros = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), definition.shapes()), out_shardings=shardings
    )
    params = zeros()
    for tensor in wanted:
        target = functools.reduce(lambda tree, key: tree[key], tensor.path[:-1], params)
        own_sharding: Any = functools.reduce(lambda tree, key: tree[key], tensor.path, shardings)
        target[tensor.path[-1]] = _put(tensors, tensor, target[tensor.path[-1]], own_sharding)
    return params


def _check(tensors: Tensors, wanted: list[HubTensor], model: ModelConfig) -> None:
    names = {tensor.name for tensor in wanted}
    if missing := sorted(names - tensors.names()):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"{tensors.folder} lacks {', '.join(missing[:3])}{more}, which its config.json asks for.")
    tied = {"lm_head.weight"} if model.tie_embeddings else set()  # Some write the embedding's copy all the same.
    unknown = sorted(name for name in tensors.names() - names - tied if not name.endswith(_IGNORED))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise DataError(f"{tensors.folder} holds {', '.join(unknown[:3])}{more}, for which its config.json has no use.")
    for tensor in wanted:
        tensors.check(tensor.name, tensor.shape)


def _put(tensors: Tensors, tensor: HubTensor, parameter: jax.Array, own_sharding: NamedSharding) -> jax.Array:
    """The parameter with a tensor in it; the parameter that was given is donated."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        ranges = (slice(*s.indices(size)) for s, size in zip(index, tensor.shape, strict=True))
        return tensors.read(tensor.name, *ranges)

    array = sharding.put(_place_there(tensor, own_sharding), tensor.shape, part)
    layer = sharding.put_whole(NamedSharding(own_sharding.mesh, PartitionSpec()), np.int32(tensor.layer or 0))
    kind = tensor._replace(name="", layer=None if tensor.layer is None else 0)  # Of all layers one program serves.
    parameter, is_finite = _update(own_sharding, kind)(parameter, array, layer)
    if not is_finite:
        raise DataError(f"{tensors.folder} holds a number in {tensor.name} that is not finite.")
    return parameter


def _place_there(tensor: HubTensor, own_sharding: NamedSharding) -> NamedSharding:
    """The sharding of a tensor, as it is there, that leaves each device with what it holds of ours."""
    mesh: Any = own_sharding.mesh
    spec = [*own_sharding.spec]
    spec = spec[1:] if tensor.layer is not None else spec
    spec += [None] * (len(tensor.own_shape) - len(spec))
    n = tensor.num_inputs
    there = [spec[n], spec[0]] if n else spec[: len(tensor.shape)]  # Of axes that are merged there the first is split.
    # Rows of a vocabulary that has other padding may not divide: then every device reads them all.
    for i, (size, entry) in enumerate(zip(tensor.shape, there, strict=True)):
        if entry is not None and size % math.prod(mesh.shape[axis] for axis in np.atleast_1d(entry)):
            there[i] = None
    return NamedSharding(mesh, PartitionSpec(*there))


@functools.cache
def _update(own_sharding: NamedSharding, tensor: HubTensor) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The program that puts a tensor into its parameter."""

    def update(parameter: jax.Array, array: jax.Array, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = (array.T if tensor.num_inputs else array).reshape(tensor.own_shape).astype(parameter.dtype)
        if tensor.layer is not None:
            own = own[None]
        start: list[Any] = [0 if tensor.layer is None else layer, *[0] * (own.ndim - 1)]
        return jax.lax.dynamic_update_slice(parameter, own, start), jnp.isfinite(array).all()

    everywhere = NamedSharding(own_sharding.mesh, PartitionSpec())
    return jax.jit(update, donate_argnums=0, out_shardings=(own_sharding, everywhere))


def fill_rows(params: Params, definition: Definition, mesh: jax.sharding.Mesh, num_rows: int, **options: Any) -> Params:
    """Gives the rows of the vocabulary that the checkpoint lacks their first values.

    Args:
      params: of `load`; donated.
      definition, mesh: as there.
      num_rows: that the checkpoint has.
      options: `own_rows`, ids below `num_rows` that are filled too; `init`: "mean", the mean of the checkpoint's rows,
        or "random", N(0, 0.02^2), as transformers' `resize_token_embeddings` (and so the official code) draws them;
        `seed` of the latter.
    """
    fill = functools.partial(_filled, num_rows=num_rows, **options)
    shardings = definition.shardings(mesh)
    for name in ("embedding", "head"):
        if name in params:
            axis = 0 if name == "embedding" else 1
            program = jax.jit(functools.partial(fill, axis=axis), donate_argnums=0, out_shardings=shardings[name])
            params[name] = program(params[name])
    return params


def _filled(table: jax.Array, num_rows: int, own_rows: tuple[int, ...], init: str, seed: int, axis: int) -> jax.Array:
    row = jax.lax.broadcasted_iota(jnp.int32, table.shape, axis)
    is_new = (row >= num_rows) | jnp.isin(row, jnp.array(own_rows, jnp.int32))
    if init == "random":
        value = 0.02 * jax.random.normal(jax.random.fold_in(jax.random.key(seed), axis), table.shape)
    else:
        value = jnp.where(is_new, 0, table).sum(axis=axis, keepdims=True) / (~is_new).sum(axis=axis, keepdims=True)
    return jnp.where(is_new, value, table)


# -------------------------------------------------------------------------------------------------------------- export


def arrays(
    params: Params, definition: Definition, mesh: jax.sharding.Mesh, num_rows: int, dtype: str
) -> Iterator[tuple[HubTensor, Callable[[], np.ndarray]]]:
    """Yields every tensor with a function that fetches it, whole, to every process.

    Args:
      params: stacked, on the mesh.
      definition: of them.
      mesh: that they are laid out on.
      num_rows: of the vocabulary that are written.
      dtype: of the tensors.
    """
    everywhere = sharding.replicated(mesh)

    @functools.partial(jax.jit, static_argnames=("tensor",), out_shardings=everywhere)
    def take(parameter: jax.Array, layer: jax.Array, tensor: HubTensor) -> jax.Array:
        if tensor.layer is not None:
            parameter = jax.lax.dynamic_index_in_dim(parameter, layer, keepdims=False)
        if tensor.path in (("embedding",), ("head",)):
            parameter = jax.lax.slice_in_dim(parameter, 0, num_rows, axis=0 if tensor.path == ("embedding",) else 1)
        if tensor.num_inputs:
            parameter = parameter.reshape(tensor.shape[::-1]).T
        return parameter.reshape(tensor.shape).astype(dtype)

    for tensor in hub_tensors(definition.config, num_rows):
        parameter = functools.reduce(lambda tree, key: tree[key], tensor.path, params)
        layer = sharding.put_whole(everywhere, np.int32(tensor.layer or 0))
        # Of all layers one program serves, so neither name nor number may be part of it.
        kind = tensor._replace(name="", layer=None if tensor.layer is None else 0)
        yield (
            tensor,
            functools.partial(
                lambda *args, kind: jax.device_get(take(*args, tensor=kind)), parameter, layer, kind=kind
            ),
        )
