"""The programs of generation with abstract arguments, to be compiled for devices that are not here."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from meap_jax import sharding
from meap_jax.decoding import CHUNK, Rules, bucket, decode, decoding_params, prefill, smallest_bucket
from meap_jax.errors import ConfigError
from meap_jax.model.cache import SLOT_AXES
from meap_jax.model.decoder import define
from meap_jax.models import Model
from meap_jax.sampling import Sampling

NUM_NEW = 512


def lowered_programs(model: Model, prompt_len: int) -> Iterator[tuple[str, Any]]:
    """Yields the name of each program and its lowering, which is to be compiled: prefill, then decoding after it.

    Args:
      model: on a mesh of abstract devices; a row of a batch is on each of data x fsdp.
      prompt_len: tokens of each prompt.

    Raises:
      ConfigError: the prompt and what follows are longer than the model's texts.
    """
    config, mesh = model.config, model.mesh
    if prompt_len + NUM_NEW > config.seq_len:
        raise ConfigError(
            f"--generate is {prompt_len}, but {NUM_NEW} tokens after it must be at most seq_len, {config.seq_len}."
        )
    definition = define(model.definition.config, is_stacked=False)
    context = mesh.shape["context"]
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    by_row, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    def array(shape: tuple[int, ...], dtype: Any, place: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    shapes = jax.eval_shape(functools.partial(decoding_params, config=definition.config), model.definition.shapes())
    params = jax.tree.map(lambda x, s: x.update(sharding=s), shapes, definition.shardings(mesh))
    T = bucket(prompt_len, smallest_bucket(definition.config, context), CHUNK)
    key_size = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape[0]
    rules = Rules(
        array((rows, key_size), jnp.uint32, by_row),
        array((definition.config.vocab_size,), jnp.bool_, everywhere),
        array((1,), jnp.int32, everywhere),
    )
    tokens, lengths = array((rows, T), jnp.int32, by_row), array((rows,), jnp.int32, by_row)
    reading = functools.partial(prefill, definition=definition, sampling=Sampling(), num_new=NUM_NEW)
    decoding = functools.partial(decode, definition=definition, sampling=Sampling())
    with jax.set_mesh(mesh):
        first: Any = jax.jit(reading).lower(params, tokens, lengths, rules)
        state_shapes = jax.eval_shape(reading, params, tokens, lengths, rules)
    yield "prefill", first
    cache = jax.sharding.NamedSharding(mesh, sharding.spec(mesh, state_shapes.cache[0][0].shape, SLOT_AXES))
    state = jax.tree.map(lambda x: x.update(sharding=by_row if x.ndim else everywhere), state_shapes)
    state = state._replace(cache=jax.tree.map(lambda x: x.update(sharding=cache), state.cache))
    then: Any = jax.jit(decoding, donate_argnums=1)
    with jax.set_mesh(mesh):
        lowered = then.lower(params, state, rules, array((), jnp.int32, everywhere))
    yield "decode", lowered
