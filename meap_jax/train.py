"""The training state and the training step."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int, Key, Shaped

from meap_jax import partition, sharding
from meap_jax.data.spec import data_spec
from meap_jax.model.decoder import Definition, Params
from meap_jax.objective import Inputs, Objective, make_inputs, named_keys
from meap_jax.optimizer import learning_rate, make_optimizer
from meap_jax.quantization import is_quantized
from meap_jax.rounding import stochastically
from meap_jax.rows import Row, abstract_rows

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """The state of training: what a step changes, and the keys that it draws from."""

    step: jax.Array  # int32 scalar: optimizer steps taken.
    params: Params  # In the dtypes of `optimizer.param_dtype` and `frozen_dtype`.
    opt_state: optax.OptState
    keys: dict[str, jax.Array]  # uint32 key data of "mask" and "noise"; constant, the step is folded in.


# ---------------------------------------------------------------------------------------------------------------- step


def train_step(
    state: TrainState,
    batch: Row,
    ratio: Float[Array, ""] | None = None,
    filler: Int[Array, ""] | None = None,
    *,
    definition: Definition,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    trainable: str,
    grad_accum_steps: int,
    rounding: str = "nearest",
    loss_options: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[TrainState, Metrics]:
    """One optimizer step: mask, forward, loss, gradient, update, metrics.

    Args:
      state: before the step.
      batch: rows of T + 1 tokens, the whole global batch.
      ratio, filler: replace the objective's mask ratio, and what fills the gaps; see `make_inputs`.
      definition, objective, optimizer, schedule, trainable, grad_accum_steps: static. `trainable` is the field of the
        config that names the parameters which train: gradients, moments and updates exist for those only.
      rounding: static, of updates to parameters that are kept in bfloat16.
      loss_options: static too, `chunk_size` and `z_loss` of `meap_jax.losses.linear_cross_entropy`.

    Returns:
      The state after the step, and float32 scalars measured on the way. Where the loss or the norm of the gradient is
      not finite, parameters and moments are what they were before.
    """
    # Mask: for the whole batch at once, so that micro-batches don't change the draw.
    keys = jax.tree.map(jax.random.wrap_key_data, state.keys)
    inputs = make_inputs(batch, objective, keys, state.step, ratio, filler)

    # Forward, loss, gradient: sums over micro-batches, divided once by the number of targets.
    num_targets = jnp.maximum(inputs.clean_weights.sum(), 1)
    trained, frozen = partition.split(state.params, trainable)

    @jax.value_and_grad
    def loss_and_grad(trained: Params, inputs: Inputs) -> jax.Array:
        return summed_loss(definition, partition.merge(trained, frozen), inputs, **loss_options)

    if grad_accum_steps == 1:
        loss, grads = loss_and_grad(trained, inputs)
    else:

        def add(total: tuple[jax.Array, Params], micro: Inputs) -> tuple[tuple[jax.Array, Params], None]:
            return jax.tree.map(jnp.add, total, loss_and_grad(trained, micro)), None

        zeros = jax.tree.map(functools.partial(jnp.zeros_like, dtype=jnp.float32), (jnp.float32(0), trained))
        (loss, grads), _ = jax.lax.scan(add, zeros, micro_batches(inputs, grad_accum_steps))
    loss, grads = jax.tree.map(lambda total: total / num_targets, (loss, grads))

    # Update, in float32; none from a loss or gradient that is not finite.
    exact = partition.cast(trained, "float32")
    grad_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, exact)
    updates, opt_state = where(
        is_finite, (updates, opt_state), (jax.tree.map(jnp.zeros_like, updates), state.opt_state)
    )
    exact = optax.apply_updates(exact, updates)
    updated = where(is_finite, rounded_like(trained, exact, rounding, keys["noise"], state.step), trained)
    params = partition.merge(updated, frozen)

    # Metrics.
    metrics = {
        "loss": loss,
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm([x.astype(jnp.float32) for x in floats(params)]),
        "update_norm": optax.tree.norm(updates),
        "mask_fraction": inputs.is_masked.sum() / jnp.maximum(num_inputs(inputs), 1),
        "num_targets": jnp.maximum((inputs.clean_weights > 0).sum(), 1).astype(jnp.float32),
    }
    return TrainState(state.step + 1, params, opt_state, state.keys), metrics


def summed_loss(definition: Definition, params: Params, inputs: Inputs, **options: Any) -> Float32[Array, ""]:
    """Cross-entropy summed over the targets that count, in nats; `options` are those of `linear_cross_entropy`."""
    where = (inputs.keep_embedding, inputs.dropout)
    return definition.decoder(params).loss(
        inputs.tokens, inputs.visibility, inputs.targets, inputs.loss_weights, *where, **options
    )


def where(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The arrays of one tree or of another."""
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def floats(params: Params) -> list[jax.Array]:
    """All parameters but those that are quantized."""
    return [x for x in jax.tree.leaves(params, is_leaf=is_quantized) if not is_quantized(x)]


def rounded_like(old: Params, new: Params, rounding: str, key: Key[Array, ""], step: jax.Array) -> Params:
    """Gives new float32 parameters the dtypes of the old; the step and the place among them are folded into the key."""
    leaves, tree = jax.tree.flatten(new)
    dtypes = [x.dtype for x in jax.tree.leaves(old)]
    if rounding == "nearest" or jnp.bfloat16 not in dtypes:
        return jax.tree.map(lambda x, old: x.astype(old.dtype), new, old)
    # A stream apart from that of random tokens, which are drawn from the key of the step itself.
    own = jax.random.fold_in(jax.random.fold_in(key, step), 2**31)
    return jax.tree.unflatten(tree, [stochastically(x, jax.random.fold_in(own, i)) for i, x in enumerate(leaves)])


def num_inputs(inputs: Inputs) -> jax.Array | int:
    """Counts the inputs that are not padding and may be gaps: of masked copies alone, where there are such rows."""
    is_input = None if inputs.segment_ids is None else inputs.segment_ids != 0
    if inputs.is_masked_copy is not None:
        is_input = inputs.is_masked_copy & (jnp.ones_like(inputs.is_masked) if is_input is None else is_input)
    return inputs.tokens.size if is_input is None else is_input.sum()


def micro_batches(inputs: Inputs, num: int) -> Inputs:
    """Stacks `num` micro-batches; the i-th takes rows i, i + num, ..., so that every device keeps its own rows."""

    def dealt(x: Shaped[Array, "B T"]) -> Shaped[Array, "num B/num T"]:
        return x.reshape(-1, num, x.shape[1]).swapaxes(0, 1)

    return jax.tree.map(dealt, inputs)


# --------------------------------------------------------------------------------------------------------------- state


def init_state(config: ml_collections.ConfigDict, definition: Definition) -> TrainState:
    """Makes the state of step 0 from the seeds of the config."""
    return state_of_params(config, definition.init(named_keys(config)["init"]))


def state_of_params(config: ml_collections.ConfigDict, params: Params) -> TrainState:
    """Makes the state of step 0 with these parameters and a fresh optimizer."""
    keys = named_keys(config)
    key_data = {name: jax.random.key_data(keys[name]) for name in ("mask", "noise")}
    trained, _ = partition.split(params, config.trainable)
    opt_state = make_optimizer(config).init(partition.cast(trained, "float32"))
    return TrainState(jnp.int32(0), partition.stored(params, config), opt_state, key_data)


def state_shardings(config: ml_collections.ConfigDict, definition: Definition, mesh: Mesh) -> TrainState:
    """The sharding of each array of the state. Moments are sharded as their parameters; the rest is replicated."""
    params = definition.shardings(mesh)
    trained, shapes = (partition.split(tree, config.trainable)[0] for tree in (params, definition.shapes()))
    optimizer = make_optimizer(config)
    everywhere: Any = sharding.replicated(mesh)  # Any: the types of TrainState are arrays, and these are shardings.
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, param_sharding: param_sharding,
        jax.eval_shape(optimizer.init, shapes),
        trained,
        transform_non_params=lambda _: everywhere,
    )
    stored = jax.tree.map(lambda x: x.sharding, partition.stored_shapes(config, definition, mesh))
    return TrainState(everywhere, stored, opt_state, {"mask": everywhere, "noise": everywhere})


def step_function(config: ml_collections.ConfigDict, definition: Definition) -> Callable:
    """Binds the static arguments of `train_step` to a config: (state, batch, [ratio, filler]) -> (state, metrics)."""
    return functools.partial(
        train_step,
        definition=definition,
        objective=Objective.of(config),
        optimizer=make_optimizer(config),
        schedule=learning_rate(config),
        trainable=config.trainable,
        grad_accum_steps=config.grad_accum_steps,
        rounding=config.optimizer.rounding,
        loss_options=config.loss.to_dict(),
    )


def compile_step(config: ml_collections.ConfigDict, definition: Definition, mesh: Mesh) -> Callable:
    """Jits the step of the config for this mesh.

    The state and the batch come in with `in_shardings`, and the new state leaves with `out_shardings`, which are the
    same: it takes the memory of the old one, which is donated. Metrics are replicated.
    """
    state = state_shardings(config, definition, mesh)
    return jax.jit(
        step_function(config, definition),
        in_shardings=(state, sharding.batch_sharding(mesh)),
        out_shardings=(state, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def abstract_inputs(config: ml_collections.ConfigDict, definition: Definition, mesh: Mesh) -> tuple[TrainState, Row]:
    """State and batch as ShapeDtypeStructs that carry shardings: what restoring and compiling ahead of time need."""
    shapes = jax.eval_shape(lambda: init_state(config, definition))
    state = jax.tree.map(lambda x, s: x.update(sharding=s), shapes, state_shardings(config, definition, mesh))
    shape = (config.global_batch_size, config.seq_len + 1)
    return state, abstract_rows(data_spec(config).row_fields, shape, sharding.batch_sharding(mesh))
