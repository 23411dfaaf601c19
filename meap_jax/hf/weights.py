"""Tensors of a transformers decoder as our parameters, and back, one tensor at a time.

A tensor goes from its file straight to the devices that hold it: each process reads the rows and columns of its own
devices alone.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
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
_TABLES = (("embedding",), ("head",))
_BLOCK_BYTES = 1 << 23  # Of float32: what is on its way at a time.
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
        return 2 if self.path[-1] in ("o_proj", "o_proj_lora_a") else 1


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


def load(
    tensors: Tensors, definition: Definition, mesh: jax.sharding.Mesh, num_rows: int, dtype: str = "float32"
) -> Params:
    """Reads all parameters; those of ours that the checkpoint lacks, rows of the vocabulary from `num_rows` on, are 0.

    Args:
      tensors: of the checkpoint.
      definition: whose parameters are stacked.
      mesh: that they are laid out on.
      num_rows: of the checkpoint's embedding and head.
      dtype: of the parameters.

    Raises:
      DataError: a tensor is missing, unknown, of another shape or dtype, or holds a number that is not finite.
    """
    wanted = hub_tensors(definition.config, num_rows)
    _check(tensors, wanted, definition.config)
    shardings = definition.shardings(mesh)
    zeros = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), definition.shapes()), out_shardings=shardings
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


def _put(
    tensors: Tensors,
    tensor: HubTensor,
    parameter: jax.Array,
    own_sharding: NamedSharding,
    new_rows: Mapping[int, np.ndarray] = MappingProxyType({}),
) -> jax.Array:
    """The parameter with a tensor in it, rows of every device in blocks; the parameter that was given is donated.

    Args:
      tensors: of the checkpoint.
      tensor: one of them.
      parameter: of `own_sharding`.
      own_sharding: of the whole parameter.
      new_rows: take the place of the tensor's; if there are any, only blocks that hold one are put.
    """
    mesh: Any = own_sharding.mesh
    spec = _spec_there(tensor, own_sharding)
    # A vocabulary that is padded here has rows of zeros that aren't there.
    rows = parameter.shape[0 if tensor.path == ("embedding",) else 1] if tensor.path in _TABLES else tensor.shape[0]
    shards = math.prod(mesh.shape[axis] for axis in np.atleast_1d(spec[0])) if spec[0] else 1
    own_rows, row_bytes = rows // shards, 4 * math.prod(tensor.shape[1:])
    block = max(1, min(own_rows, _BLOCK_BYTES // row_bytes))
    update = _update(own_sharding, tensor._replace(name="", layer=tensor.layer and 0), spec)
    everywhere = NamedSharding(mesh, PartitionSpec())
    layer = sharding.put_whole(everywhere, np.int32(tensor.layer or 0))
    for first in range(0, own_rows, block):
        first = min(first, own_rows - block)  # The last one begins early enough to be of the same shape.
        if new_rows and not any(first <= row % own_rows < first + block for row in new_rows):
            continue

        def part(index: tuple[slice, ...], first: int = first) -> np.ndarray:
            start = (index[0].start or 0) // block * own_rows + first
            columns = [slice(*s.indices(size)) for s, size in zip(index[1:], tensor.shape[1:], strict=True)]
            there = min(max(tensor.shape[0] - start, 0), block)
            found = tensors.read(tensor.name, slice(start, start + there), *columns)
            if there < block:
                found = np.pad(found, ((0, block - there), *[(0, 0)] * len(columns)))
            if new_rows:
                found = found.astype(np.float32)
            for row in range(start, start + block):
                if row in new_rows:
                    found[row - start] = new_rows[row][columns[0]]
            return found

        array = sharding.put(NamedSharding(mesh, spec), (shards * block, *tensor.shape[1:]), part)
        parameter, is_finite = update(parameter, array, layer, sharding.put_whole(everywhere, np.int32(first)))
        if not is_finite:
            raise DataError(f"{tensors.folder} holds a number in {tensor.name} that is not finite.")
    return parameter


def _spec_there(tensor: HubTensor, own_sharding: NamedSharding) -> PartitionSpec:
    """How a tensor, as it is there, is split so that each device has what it holds of ours."""
    spec = [*own_sharding.spec]
    spec = spec[1:] if tensor.layer is not None else spec
    spec += [None] * (len(tensor.own_shape) - len(spec))
    n = tensor.num_inputs
    # Of axes that are one axis there, the first alone is ever split.
    return PartitionSpec(spec[n], spec[0]) if n else PartitionSpec(*spec[: len(tensor.shape)])


@functools.cache
def _update(own_sharding: NamedSharding, tensor: HubTensor, spec: PartitionSpec) -> Callable[..., tuple]:
    """The program that puts a block of rows into a parameter, on every device its own."""

    def on_device(
        parameter: jax.Array, block: jax.Array, layer: jax.Array, first: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        own = (block.T if tensor.num_inputs else block).astype(parameter.dtype)
        start: list[Any] = [0, first] if tensor.num_inputs else [first, *[0] * (block.ndim - 1)]
        flat_shape: list[int] = [-1] if block.ndim == 1 else [math.prod(x) for x in _split(parameter.shape, tensor)]
        if tensor.layer is not None:
            own, start, flat_shape = own[None], [layer, *start], [len(parameter), *flat_shape]
        flat = jax.lax.dynamic_update_slice(parameter.reshape(flat_shape), own, start)
        is_finite = jax.lax.pmin(jnp.isfinite(block).all().astype(jnp.int32), sharding.AXES)
        return flat.reshape(parameter.shape), is_finite

    local = jax.shard_map(
        on_device,
        mesh=own_sharding.mesh,
        in_specs=(own_sharding.spec, spec, PartitionSpec(), PartitionSpec()),
        out_specs=(own_sharding.spec, PartitionSpec()),
        check_vma=False,
    )
    return jax.jit(local, donate_argnums=0)


def _split(shape: tuple[int, ...], tensor: HubTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a parameter that are inputs, or rows, and those that are outputs, or columns."""
    own = shape if tensor.layer is None else shape[1:]
    n = tensor.num_inputs or 1
    return own[:n], own[n:]


def fill_rows(
    params: Params,
    tensors: Tensors,
    definition: Definition,
    mesh: jax.sharding.Mesh,
    num_rows: int,
    *,
    own_rows: Sequence[int] = (),
    init: str = "mean",
    seed: int = 0,
) -> None:
    """Gives the rows of the vocabulary that the checkpoint lacks their first values, in place.

    Args:
      params, tensors, definition, mesh, num_rows: what `load` returned and was given.
      own_rows: ids below `num_rows` that are filled too.
      init: "mean", the mean of all other rows, or "random", N(0, 0.02^2), as transformers' `resize_token_embeddings`
        (and so the official code) draws them.
      seed: of what is drawn.
    """
    rows = [*own_rows, *range(num_rows, definition.config.vocab_size)]
    shardings = definition.shardings(mesh)
    for tensor in hub_tensors(definition.config, num_rows):
        if tensor.path not in _TABLES or not rows:
            continue
        [name], axis = tensor.path, 1 if tensor.num_inputs else 0
        width = tensor.shape[1]
        if init == "random":
            key = jax.random.fold_in(jax.random.key(seed), axis)
            values = 0.02 * np.asarray(jax.random.normal(key, (len(rows), width)))
        else:
            summed = functools.partial(jnp.sum, axis=axis, dtype=jnp.float32)
            total = np.array(jax.jit(summed, out_shardings=sharding.replicated(mesh))(params[name]))
            for row in own_rows:
                total -= tensors.read(tensor.name, slice(row, row + 1), slice(0, width))[0].astype(np.float32)
            values = np.broadcast_to(total / (definition.config.vocab_size - len(rows)), (len(rows), width))
        params[name] = _put(tensors, tensor, params[name], shardings[name], dict(zip(rows, values, strict=True)))


# -------------------------------------------------------------------------------------------------------------- export


Read = Callable[[tuple[str, ...]], jax.Array]  # (path of a parameter) -> the parameter, stacked, on the mesh.


class Outgoing(NamedTuple):
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]  # Of rows, in order; every process gets all.


def outgoing(read: Read, tensors: Sequence[HubTensor], mesh: Any, dtype: str) -> list[Outgoing]:
    """Tensors as they are to be written; those of one parameter follow one another.

    Args:
      read: is called when the first of a parameter's tensors is fetched, and the parameter is kept until another one
        is.
      tensors: of `hub_tensors` or `adapter.tensors`.
      mesh: that the parameters are laid out on.
      dtype: of the tensors.
    """
    kept: dict[tuple[str, ...], jax.Array] = {}

    def parameter_of(tensor: HubTensor) -> jax.Array:
        if tensor.path not in kept:
            kept.clear()  # First, so that there are never two.
            kept[tensor.path] = read(tensor.path)
        return kept[tensor.path]

    def blocks(tensor: HubTensor) -> Iterator[np.ndarray]:
        parameter = parameter_of(tensor)
        everywhere = sharding.replicated(mesh)
        rows = tensor.shape[0]
        block = max(1, min(rows, _BLOCK_BYTES // (4 * math.prod(tensor.shape[1:]))))
        take = _take(everywhere, tensor._replace(name="", layer=tensor.layer and 0), block, dtype)
        layer = sharding.put_whole(everywhere, np.int32(tensor.layer or 0))
        for first in range(0, rows, block):
            start = min(first, rows - block)  # The last block begins early enough to be of the same shape.
            found = take(parameter, layer, sharding.put_whole(everywhere, np.int32(start)))
            yield jax.device_get(found)[first - start :]

    order = list(dict.fromkeys(tensor.path for tensor in tensors))
    tensors = sorted(tensors, key=lambda tensor: order.index(tensor.path))
    return [Outgoing(tensor.name, tensor.shape, functools.partial(blocks, tensor)) for tensor in tensors]


@functools.cache
def _take(everywhere: NamedSharding, tensor: HubTensor, block: int, dtype: str) -> Callable[..., jax.Array]:
    """The program that fetches a block of rows."""

    def take(parameter: jax.Array, layer: jax.Array, first: jax.Array) -> jax.Array:
        own = parameter if tensor.layer is None else jax.lax.dynamic_index_in_dim(parameter, layer, keepdims=False)
        flat = own.reshape([-1] if len(tensor.shape) == 1 else [math.prod(x) for x in _split(parameter.shape, tensor)])
        axis = 1 if tensor.num_inputs else 0
        rows = jax.lax.dynamic_slice_in_dim(flat, first, block, axis).astype(dtype)
        return rows.T if tensor.num_inputs else rows

    return jax.jit(take, out_shardings=everywhere)
