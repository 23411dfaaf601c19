"""Validation loss on clean inputs, and on masked ones beside it."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from meap_jax import sharding
from meap_jax.data.prepared import Blocks
from meap_jax.evals.batching import batches
from meap_jax.model.decoder import Definition, Params
from meap_jax.objective import Objective, clean_inputs, make_inputs, named_keys
from meap_jax.train import summed_loss


class Validation:
    """Mean cross-entropy in nats a token over held-out rows.

    `loss` is on clean inputs, whatever the run was trained with. `masked_loss` is on inputs masked as MEAP would with
    the config's ratio, the same for every objective and at every step.
    """

    def __init__(self, config: ml_collections.ConfigDict, definition: Definition, blocks: Blocks, mesh: Mesh):
        self._blocks, self._mesh = blocks, mesh
        self._batch_size, self._max_rows = config.global_batch_size, config.eval.max_rows
        meap = dataclasses.replace(
            Objective.of(config), name="meap", mask_ratio=config.objective.mask_ratio, strategy="random"
        )
        losses = functools.partial(_losses, definition, meap, config.loss.chunk_size)
        self._step = jax.jit(losses, out_shardings=sharding.replicated(mesh))
        # A stream of its own: never the masks of a training step.
        self._key = sharding.put_whole(
            sharding.replicated(mesh),
            np.asarray(jax.random.key_data(jax.random.fold_in(named_keys(config)["mask"], 2**31))),
        )

    def run(self, params: Params) -> Iterator[tuple[str, float]]:
        """Yields the two losses."""
        sums = [
            self._step(params, batch, self._key, sharding.put_whole(sharding.replicated(self._mesh), np.asarray(i)))
            for i, batch in enumerate(batches(self._blocks, self._mesh, self._batch_size, self._max_rows))
        ]
        clean, masked, num_targets = (sum(float(x[i]) for x in jax.device_get(sums)) for i in range(3))
        yield "loss", clean / num_targets
        yield "masked_loss", masked / num_targets


def _losses(
    definition: Definition,
    meap: Objective,
    chunk_size: int,
    params: Params,
    batch: dict[str, jax.Array],
    key_data: jax.Array,
    index: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    clean = clean_inputs(batch)
    masked = make_inputs(batch, meap, {"mask": jax.random.wrap_key_data(key_data)}, index)
    summed = functools.partial(summed_loss, definition, params, chunk_size=chunk_size)
    return summed(clean), summed(masked), clean.loss_weights.sum()
