"""Our optimizer beside PyTorch's AdamW."""

import jax
import numpy as np
import optax
import torch

from meap_jax import config as config_lib
from meap_jax.optimizer import learning_rate, make_optimizer


def test_four_steps_equal_pytorchs_adamw():
    c = config_lib.base()
    c.num_steps = 10
    c.optimizer.update(learning_rate=0.1, warmup_fraction=0.2, weight_decay=0.1, clip_norm=1.0)
    rng = np.random.default_rng(0)
    params = {"embedding": np.float32(rng.normal(size=(3, 2))), "final_norm": {"scale": np.float32([1, -2])}}
    optimizer = make_optimizer(c)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    theirs = jax.tree.map(lambda p: torch.nn.Parameter(torch.tensor(p)), params)
    parameters = jax.tree.leaves(theirs)
    adamw = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step, spread in enumerate([0.01, 5, 0.1, 2]):  # The norm is below the clip's at first, and far above it later.
        grads = jax.tree.map(lambda p, spread=spread: np.float32(rng.normal(0, spread, p.shape)), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)

        for parameter, grad in zip(parameters, jax.tree.leaves(grads), strict=True):
            parameter.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.param_groups[0]["lr"] = float(learning_rate(c)(step))
        adamw.step()
        for ours, parameter in zip(jax.tree.leaves(params), parameters, strict=True):
            np.testing.assert_allclose(ours, parameter.detach(), rtol=2e-5, atol=1e-6, err_msg=f"step {step}")
