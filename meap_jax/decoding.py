"""The programs of generation: prefill of a cache from prompts, and a loop that decodes token by token.

Prompts are padded on the right, to a length that many lengths share, and a cache has room for them and for all tokens
that may follow, so that few programs serve all calls. Of a long prompt the first chunk goes through the kernels of
training, and each other one attends to what the cache holds: what is held at a time does not grow with the prompt.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from meap_jax import sharding
from meap_jax.model.cache import SLOT_AXES, SlotCache
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import Definition, Params, context_shards, unstack
from meap_jax.model.visibility import Visibility
from meap_jax.quantization import Quantized, dequantize, is_quantized
from meap_jax.sampling import Sampling, choose, log_probability
from meap_jax.sharding import constrain

CHUNK = 2_048  # Tokens of a prompt that are computed at a time.
EMPTY = -1  # The segment of a slot that holds nothing; 0 is padding, 1 text.


class State(NamedTuple):
    """Where generation stands, for B rows."""

    cache: tuple[tuple[jax.Array, jax.Array], ...]  # Of each layer keys and values, [B, K, S, d].
    slots: Visibility  # [B, S]: which token is in which slot.
    filled: Int32[Array, ""]  # Slots that each device of `context` has filled.
    num_tokens: Int32[Array, " B"]  # Of each row's text so far, without `token`: its position.
    token: Int32[Array, " B"]  # The newest, which is not in the cache yet.
    num_generated: Int32[Array, ""]
    is_done: Bool[Array, " B"]  # A stop token came.
    generated: Int32[Array, "B N"]  # The tokens that were chosen; -1 after the stop token.
    log_probs: Float32[Array, "B N"]  # Of each, in nats; 0 if they were not asked for.


class Rules(NamedTuple):
    """What each choice of a token goes by; arrays, so that other values take no other program."""

    keys: UInt32[Array, "B key"]  # Key data of each row; the number of the token is folded in.
    never: Bool[Array, " V"]  # Tokens that are not chosen.
    stops: Int32[Array, " M"]  # Tokens that end a text.


def decoding_params(params: Params, config: ModelConfig) -> Params:
    """Parameters as decoding reads them: a tree for each layer, matrices in the compute dtype."""

    def read(x: jax.Array | Quantized) -> jax.Array:
        if isinstance(x, Quantized):
            return dequantize(x, config.dtype)
        return x.astype(config.dtype) if x.ndim > 1 else x

    return jax.tree.map(read, unstack(params), is_leaf=is_quantized)


def bucket(length: int, smallest: int, largest: int) -> int:
    """The length that a prompt is padded to.

    smallest * 2^n up to `largest`. Beyond it a multiple of `largest`, with no more padding than that or a quarter of
    the prompt: a cache of so many slots is made, and most of the program's memory is that.
    """
    if length <= largest:
        return min(smallest * 2 ** math.ceil(math.log2(max(length / smallest, 1))), largest)
    step = max(largest, 2 ** math.floor(math.log2(length / largest)) * largest // 4)
    return -(-length // step) * step


def smallest_bucket(config: ModelConfig, context: int) -> int:
    """The shortest length that prompts are padded to, over so many devices of `context`: splash wants 128 on each."""
    return (128 if config.attention == "splash" else 16) * context


def prefill(
    params: Params,
    tokens: Int32[Array, "B T"],
    lengths: Int32[Array, " B"],
    rules: Rules,
    *,
    definition: Definition,
    sampling: Sampling,
    num_new: int,
    chunk: int = CHUNK,
    with_log_probs: bool = False,
    before: State | None = None,
    start: Int32[Array, ""] | None = None,
) -> State:
    """Reads prompts and chooses the first token after each.

    Where prompts begin as others did that were read before, only the rest is read: keys and values of what comes first
    don't depend on what comes later.

    Args:
      params: of `decoding_params`.
      tokens: prompts, padded on the right; T at most `chunk`, or a multiple of it.
      lengths: of the prompts, 1 to T.
      rules: as in `decode`.
      definition, sampling, num_new, chunk, with_log_probs: static; `num_new` tokens may be generated. `chunk` is a
        multiple of twice the devices of `context`.
      before: what this function returned for prompts of the same shapes and sizes; it stays as it is.
      start: so many tokens of each row are the same as in `before`; a multiple of `chunk`, and less than each length.
    """
    c, (B, T), context = definition.config, tokens.shape, context_shards()
    last_BD = jnp.zeros((B, c.embed_dim), c.dtype)

    def read(
        done: tuple, own: jax.Array, positions: jax.Array, mode: str
    ) -> tuple[tuple, Visibility, jax.Array, jax.Array]:
        cache, slots, filled, last_BD = done
        visibility = Visibility((positions < lengths[:, None]).astype(jnp.int32), positions)
        x_BTD, cache, slots = _extend(params, own, visibility, cache, slots, filled, definition, mode)
        is_last = positions == lengths[:, None] - 1
        last_BD += jnp.einsum("BTD,BT->BD", x_BTD, is_last.astype(x_BTD.dtype))
        return cache, slots, filled + own.shape[1] // context, last_BD

    def next_chunk(i: jax.Array, done: tuple) -> tuple:
        own = jax.lax.dynamic_slice_in_dim(tokens, i * chunk, chunk, axis=1)
        positions = jnp.broadcast_to(i * chunk + jnp.arange(chunk, dtype=jnp.int32), (B, chunk))
        return read(done, own, positions, "chunk")

    first_chunk: int | jax.Array = 1
    if before is not None and start is not None:
        is_shared = (before.slots.positions < start) & (before.slots.segment_ids == 1)
        slots = Visibility(jnp.where(is_shared, 1, EMPTY), before.slots.positions)
        done, first_chunk = (before.cache, slots, start // context, last_BD), start // chunk
    else:
        num_slots, first = T + num_new * context, min(T, chunk)
        slots = Visibility(jnp.full((B, num_slots), EMPTY, jnp.int32), jnp.zeros((B, num_slots), jnp.int32))
        empty = constrain(jnp.zeros((B, c.num_kv_heads, num_slots, c.head_dim), c.dtype), *SLOT_AXES)
        cache = tuple((empty, empty) for _ in range(c.num_layers))
        own, positions = tokens[:, :first], jnp.broadcast_to(jnp.arange(first, dtype=jnp.int32), (B, first))
        own, positions = (sharding.zigzag(x, context) for x in (own, positions))
        done = read((cache, slots, jnp.int32(0), last_BD), own, positions, "first")
    if T > chunk:
        done = jax.lax.fori_loop(first_chunk, -(-lengths.max() // chunk), next_chunk, done)
    cache, slots, filled, last_BD = done
    state = State(
        cache, slots, filled, lengths, jnp.zeros(B, jnp.int32), jnp.int32(0), jnp.zeros(B, bool),
        jnp.full((B, num_new), -1, jnp.int32), jnp.zeros((B, num_new), jnp.float32),
    )  # fmt: skip
    logits_BV = definition.decoder(params).logits(last_BD[:, None])[:, 0].astype(jnp.float32)
    return _chosen(state, logits_BV, rules, sampling, with_log_probs)


def decode(
    params: Params,
    state: State,
    rules: Rules,
    limit: Int32[Array, ""],
    *,
    definition: Definition,
    sampling: Sampling,
    with_log_probs: bool = False,
) -> State:
    """Generates until `limit` tokens are there or every row came to a stop token, in one loop on the device.

    Args:
      params: of `decoding_params`.
      state: of `prefill`, or of this function before.
      rules: what tokens are chosen by.
      limit: at most the number that `prefill` made room for.
      definition, sampling, with_log_probs: static.
    """

    def step(state: State) -> State:
        visibility = Visibility(jnp.ones_like(state.token)[:, None], state.num_tokens[:, None])
        x_B1D, cache, slots = _extend(
            params, state.token[:, None], visibility, state.cache, state.slots, state.filled, definition, "token"
        )
        logits_BV = definition.decoder(params).logits(x_B1D)[:, 0].astype(jnp.float32)
        state = state._replace(cache=cache, slots=slots, filled=state.filled + 1, num_tokens=state.num_tokens + 1)
        return _chosen(state, logits_BV, rules, sampling, with_log_probs)

    def goes_on(state: State) -> jax.Array:
        return (state.num_generated < limit) & ~state.is_done.all()

    return jax.lax.while_loop(goes_on, step, state)


def _chosen(
    state: State, logits_BV: Float32[Array, "B V"], rules: Rules, sampling: Sampling, with_log_probs: bool
) -> State:
    """The state with one more token for each row that is not done."""
    n = state.num_generated
    keys = jax.vmap(jax.random.fold_in, (0, None))(jax.random.wrap_key_data(rules.keys), n)
    token = choose(logits_BV, rules.never, keys, sampling)
    written = jnp.where(state.is_done, -1, token)
    log_probs = state.log_probs
    if with_log_probs:
        log_probs = log_probs.at[:, n].set(jnp.where(state.is_done, 0, log_probability(logits_BV, token)))
    return state._replace(
        token=token,
        num_generated=n + 1,
        is_done=state.is_done | (token[:, None] == rules.stops).any(axis=1),
        generated=state.generated.at[:, n].set(written),
        log_probs=log_probs,
    )


def _extend(
    params: Params,
    tokens: jax.Array,
    visibility: Visibility,
    cache: tuple,
    slots: Visibility,
    filled: jax.Array,
    definition: Definition,
    mode: str,
) -> tuple[jax.Array, tuple, Visibility]:
    """Hidden states of tokens that come next, and the cache with them in it; see `SlotCache` for modes."""
    slots = _described(slots, visibility, filled, mode)
    caches: Any = [SlotCache(k, v, slots, filled, mode) for k, v in cache]
    x_BTD, caches = definition.decoder(params).extend(tokens, visibility, caches, splits_sequence=mode != "token")
    return x_BTD, tuple((own.k, own.v) for own in caches), slots


def _described(slots: Visibility, tokens: Visibility, filled: jax.Array, mode: str) -> Visibility:
    """The visibility of slots once tokens, in the order of the devices of `context`, are in the next ones of each."""
    context = context_shards()
    if mode == "token":  # Every device has it, the first shows it.
        tokens = jax.tree.map(lambda x: jnp.repeat(x, context, axis=1), tokens)
        is_shown = jnp.arange(context) == 0
        tokens = Visibility(jnp.where(is_shown, 1, EMPTY) + jnp.zeros_like(tokens.positions), tokens.positions)

    def put(slots_BS: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        B = len(slots_BS)
        split, new = slots_BS.reshape(B, context, -1), tokens_BT.reshape(B, context, -1)
        return jax.lax.dynamic_update_slice_in_dim(split, new, filled, axis=2).reshape(B, -1)

    return jax.tree.map(put, slots, tokens)
