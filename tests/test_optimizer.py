"""The schedule by hand at a few steps, and AdamW against a slow loop; tests/parity has PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from meap_jax import config as config_lib
from meap_jax.optimizer import learning_rate, make_optimizer


def run_config(num_steps=10, **fields):
    c = config_lib.base()
    c.num_steps = num_steps
    c.optimizer.update(dict(learning_rate=1.0, warmup_fraction=0.2, weight_decay=0.1) | fields)
    return c


# ------------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    "step, rate",
    [
        (0, 0.5),  # The first step moves: half way up a warm-up of two.
        (1, 1.0),  # The peak, at the end of the warm-up.
        (5, 0.55),  # Half way down the cosine: between 1 and 0.1.
        (9, 0.1),  # The last step: 10 % of the peak.
    ],
)
def test_the_rate_rises_linearly_and_falls_by_cosine_to_a_tenth(step, rate):
    np.testing.assert_allclose(learning_rate(run_config())(step), rate, rtol=1e-6)


def test_the_papers_rate_peaks_at_4e_4_after_a_tenth_and_ends_at_4e_5():
    c = config_lib.paper("100m", "meap")
    rates = np.asarray(jax.vmap(learning_rate(c))(jnp.arange(1907)))
    assert rates[0] > 0 and rates.argmax() == 190
    np.testing.assert_allclose(rates[[0, 190, 1906]], [4e-4 / 191, 4e-4, 4e-5], rtol=1e-5)
    assert (np.diff(rates[:191]) > 0).all() and (np.diff(rates[190:]) <= 0).all()


@pytest.mark.parametrize("num_steps, warmup_fraction", [(10, 0.0), (1, 0.0), (1, 0.5), (1, 1.0)])
def test_without_warm_up_and_in_a_run_of_one_step_the_first_has_the_peak(num_steps, warmup_fraction):
    np.testing.assert_allclose(learning_rate(run_config(num_steps, warmup_fraction=warmup_fraction))(0), 1.0)


# ----------------------------------------------------------------------------------------------------------- the update

PARAMS = {
    "embedding": np.linspace(-1, 1, 6).reshape(3, 2),
    "layers": {"attn_norm": {"scale": np.array([[1.0, 2.0], [0.5, -1.0]])}, "mlp": {"up": np.full((2, 2, 2), 0.3)}},
    "final_norm": {"scale": np.array([1.0, -2.0])},
}
PARAMS = jax.tree.map(np.float32, PARAMS)
NORMS = {("layers", "attn_norm", "scale"), ("final_norm", "scale")}


def gradients(step):
    """Of global norm far below 1 at the first step and far above it later, so that clipping shows.

    The first element of each array is 0, as for a token that never comes: Adam's eps is all that it is divided by.
    """
    rng = np.random.default_rng(step)

    def gradient(p):
        return np.float32(rng.normal(0, [0.01, 5, 0.1, 2][step], p.shape) * (np.arange(p.size) > 0).reshape(p.shape))

    return jax.tree.map(gradient, PARAMS)


@pytest.mark.parametrize(
    "decay_on, moment_dtype", [("all", "float32"), ("matrices", "float32"), ("matrices", "bfloat16")]
)
def test_four_steps_equal_a_slow_loop(decay_on, moment_dtype):
    """Moments are computed with in float32, whatever they are kept in between steps."""
    c = run_config(decay_on=decay_on, moment_dtype=moment_dtype, clip_norm=1.0, learning_rate=0.1)
    optimizer = make_optimizer(c)
    update, ours, state = jax.jit(optimizer.update), PARAMS, jax.jit(optimizer.init)(PARAMS)
    params = {path: x.astype(np.float64) for path, x in flatten_dict(PARAMS).items()}
    m, v = ({path: np.zeros(x.shape) for path, x in params.items()} for _ in range(2))
    for step, rate in enumerate([0.05, 0.1, 0.09657457, 0.08681981]):  # 0.1 * (0.1 + 0.9 * (1 + cos(pi * t / 8)) / 2)
        updates, state = update(gradients(step), state, ours)
        ours, grads = jax.tree.map(np.add, ours, updates), flatten_dict(gradients(step))
        norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in grads.values()))
        for path, p in params.items():
            g = grads[path] * min(1.0, 1.0 / norm)
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.95 * v[path] + 0.05 * g**2
            adam = m[path] / (1 - 0.9 ** (step + 1)) / (np.sqrt(v[path] / (1 - 0.95 ** (step + 1))) + 1e-8)
            decay = 0.0 if decay_on == "matrices" and path in NORMS else 0.1
            params[path] = p - rate * (adam + decay * p)
            m[path], v[path] = (x.astype(moment_dtype).astype(np.float64) for x in (m[path], v[path]))
    for path, p in flatten_dict(ours).items():
        np.testing.assert_allclose(p, params[path], rtol=2e-5, atol=1e-6, err_msg=str(path))
