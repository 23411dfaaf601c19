"""AdamW with clipping, linear warm-up and cosine decay: Table 11 of the paper."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Makes the schedule: the learning rate of each optimizer step, counted from 0.

    Linear from 0 to the peak over `warmup_fraction * num_steps`, then cosine to `final_fraction` of it at `num_steps`.
    Step s uses the schedule at s + 1, so that the first step moves, as that of the official code does with its last
    micro-batch.
    """
    o = config.optimizer
    warmup = max(1, round(o.warmup_fraction * config.num_steps))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=o.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(config.num_steps, warmup + 1),
        end_value=o.final_fraction * o.learning_rate,
    )
    return lambda step: schedule(step + 1)


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Makes AdamW, with clipping by global norm before it and decoupled weight decay times the learning rate.

    `decay_on="all"` decays every parameter, norms and embeddings too, as the official code does
    (`torch.optim.AdamW(model.parameters(), ...)`); "matrices" leaves out the norms.
    """
    o = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        _with_moments_in(optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps), jnp.dtype(o.moment_dtype)),
        optax.add_decayed_weights(o.weight_decay, mask=None if o.decay_on == "all" else _is_matrix),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def _with_moments_in(adam: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """Makes Adam store both moments in `dtype` between steps; it computes with them in float32.

    (optax's mu_dtype is for the first alone.) With b2 = 0.95 a step moves the second moment by up to a twentieth, which
    bfloat16's steps of 1/256 can hold; with b2 = 0.999 they could not.
    """
    if dtype == jnp.float32:
        return adam

    def cast(state: optax.ScaleByAdamState, dtype: jnp.dtype) -> optax.ScaleByAdamState:
        mu, nu = jax.tree.map(lambda x: x.astype(dtype), (state.mu, state.nu))
        return state._replace(mu=mu, nu=nu)

    def init(params: Any) -> optax.ScaleByAdamState:
        return cast(adam.init(params), dtype)

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        updates, state = adam.update(grads, cast(state, jnp.dtype(jnp.float32)), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _is_matrix(params: Any) -> Any:
    """Whether each parameter is a matrix: a tree of bools like that of the parameters."""

    def decays(path: tuple[Any, ...], p: jax.Array) -> bool:
        # Layers are stacked, so that a norm's scale is [L, D] too: only its name shows it.
        is_scale = any("norm" in str(getattr(key, "key", key)) for key in path)
        return not is_scale and jnp.ndim(p) >= 2

    return jax.tree_util.tree_map_with_path(decays, params)
