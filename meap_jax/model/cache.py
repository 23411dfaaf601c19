"""The interface of a cache of keys and values, and the one that generation uses.

A cache has S *slots* for each row and kv head, made once. On a mesh rows are split over (data, fsdp), kv heads over
`tensor` where it divides them, and slots over `context`: each of these devices holds the slots of some tokens, attends
to those, and the results are combined. So a token's slot is not its position; `slots`, a `Visibility`, tells which
token is where. All devices fill their slots from the first on, as many at a time as the others.
"""

import dataclasses
from typing import Protocol, no_type_check, runtime_checkable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from meap_jax import sharding
from meap_jax.model.attention import attention, own_kv_heads
from meap_jax.model.attention_slots import attend_to_slots, combine
from meap_jax.model.visibility import Visibility

SLOT_AXES = ("batch", "kv_heads", "sequence", None)  # Logical axes of the arrays of a `SlotCache`.


@runtime_checkable
class Cache(Protocol):
    """Keys and values of the tokens so far, in one layer; a pytree."""

    def attend(
        self,
        q: Float[Array, "B T H d"],
        k: Float[Array, "B T K d"],
        v: Float[Array, "B T K d"],
        visibility: Visibility,
        implementation: str,
    ) -> tuple[Float[Array, "B T H d"], "Cache"]:
        """Adds the keys and values of T tokens; returns what these attend to, and the cache that holds them.

        Args:
          q: [B, T, H, d], turned by RoPE, as k.
          k, v: [B, T, K, d].
          visibility: of the T tokens, with the layer's window.
          implementation: of attention, as in `meap_jax.model.attention.attention`.
        """
        ...


@no_type_check  # A transformation of JAX may hold anything in place of the arrays.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotCache:
    """The slots of one layer, with those of the tokens that are about to come already described.

    `mode` says how the tokens come: "first" into empty slots, where they attend to one another by a training kernel, in
    the order of the zig-zag; "chunk" after others, split over `context`; "token" one for each row, on every device of
    `context`, of which the first alone shows it.
    """

    k: Float[Array, "B K S d"]
    v: Float[Array, "B K S d"]
    slots: Visibility  # [B, S], with the tokens that come; segment 0 where a slot is empty.
    filled: Int32[Array, ""]  # Slots that each device of `context` had filled before.
    mode: str = dataclasses.field(metadata={"static": True})

    @no_type_check
    def attend(self, q, k, v, visibility, implementation):
        """As `Cache.attend`."""
        rows, kv = sharding.RULES["batch"], "tensor" if self._splits_kv(k.shape[2]) else None
        mesh = jax.sharding.get_abstract_mesh()
        if self.mode == "first":
            context = sharding.shards_of(mesh, "context")
            in_text_order = jax.tree.map(lambda x: sharding.unzigzag(x, context), visibility)
            out = attention(q, k, v, in_text_order, implementation=implementation)
            write = _write
            if not sharding.is_trivial(mesh):
                slots, new = PartitionSpec(rows, kv, "context"), PartitionSpec(rows, "context", kv)
                specs = dict(in_specs=(slots, slots, new, new, PartitionSpec()), out_specs=(slots, slots))
                write = jax.shard_map(_write, check_vma=False, **specs)
            k, v = write(self.k, self.v, k, v, self.filled)
            return out, dataclasses.replace(self, k=k, v=v)

        def on_device(own_k, own_v, q, k, v, visibility, slots, filled):
            own_k, own_v = _write(own_k, own_v, k, v, filled)
            splits = self.mode == "chunk" and sharding.shards_of(mesh, "context") > 1
            if splits:
                q, visibility = jax.tree.map(
                    lambda x: jax.lax.all_gather(x, "context", axis=1, tiled=True), (q, visibility)
                )
            seen_k, seen_v = own_k, own_v
            if kv is None and sharding.shards_of(mesh, "tensor") > 1:
                shards = sharding.shards_of(mesh, "tensor")
                seen_k, seen_v = (own_kv_heads(x, q.shape[2] * shards, shards, axis=1) for x in (own_k, own_v))
            parts = attend_to_slots(q, seen_k, seen_v, visibility, slots, filled + k.shape[1])
            over = "context" if sharding.shards_of(mesh, "context") > 1 else None
            return combine(*parts, over=over, scatter=splits).astype(q.dtype), own_k, own_v

        if sharding.is_trivial(mesh):
            out, k, v = on_device(self.k, self.v, q, k, v, visibility, self.slots, self.filled)
        else:
            sequence = "context" if self.mode == "chunk" else None
            of_slots, of_tokens = PartitionSpec(rows, kv, "context"), PartitionSpec(rows, sequence)
            q_spec, kv_spec = PartitionSpec(rows, sequence, "tensor"), PartitionSpec(rows, sequence, kv)
            out, k, v = jax.shard_map(
                on_device,
                in_specs=(
                    of_slots, of_slots, q_spec, kv_spec, kv_spec,
                    jax.tree.map(lambda _: of_tokens, visibility),
                    jax.tree.map(lambda _: PartitionSpec(rows, "context"), self.slots),
                    PartitionSpec(),
                ),
                out_specs=(q_spec, of_slots, of_slots),
                check_vma=False,
            )(self.k, self.v, q, k, v, visibility, self.slots, self.filled)  # fmt: skip
        return out, dataclasses.replace(self, k=k, v=v)

    @no_type_check
    def _splits_kv(self, num_kv_heads):
        return num_kv_heads % sharding.shards_of(jax.sharding.get_abstract_mesh(), "tensor") == 0


def _write(
    own_k: jax.Array, own_v: jax.Array, k: jax.Array, v: jax.Array, filled: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Puts [B, T, K, d] into the slots [B, K, S, d] of this device, from slot `filled` on."""
    place = (0, 0, filled, 0)
    return (
        jax.lax.dynamic_update_slice(own_k, k.swapaxes(1, 2).astype(own_k.dtype), place),
        jax.lax.dynamic_update_slice(own_v, v.swapaxes(1, 2).astype(own_v.dtype), place),
    )
