"""Validation loss on clean inputs and on masked ones."""

import dataclasses
import functools

import jax
import numpy as np

from meap_jax import sharding
from meap_jax.data.prepared import AnyBlocks
from meap_jax.evals.batching import batches
from meap_jax.evals.setting import Setting
from meap_jax.model.decoder import Definition, Params
from meap_jax.objective import Inputs, Objective, clean_inputs, make_inputs, named_keys
from meap_jax.results import Result
from meap_jax.rows import Row
from meap_jax.statistics import ratio_interval


def make(setting: Setting) -> dict[str, "Validation"]:
    """Makes one for each source that has held-out rows."""
    return {name: Validation(setting, blocks) for name, blocks in setting.held_out().items() if len(blocks)}


class Validation:
    """Mean cross-entropy in nats a token over held-out rows; an example is a row.

    `loss` is on clean inputs, whatever the run was trained with. `masked_loss` is on inputs masked as MEAP would with
    the config's ratio, the same for every objective and at every step.
    """

    def __init__(self, setting: Setting, blocks: AnyBlocks):
        (config, self._mesh, definition), self._blocks = setting.model, blocks
        self._batch_size, self._max_rows = config.global_batch_size, config.eval.max_rows
        meap = dataclasses.replace(
            Objective.of(config), name="meap", mask_ratio=config.objective.mask_ratio, strategy="random",
            ramp_from=None, ratio_per_row=False, rows_per_mean=0,
        )  # fmt: skip
        losses = functools.partial(_losses, definition, meap, config.loss.chunk_size, config.objective.where != "all")
        self._step = jax.jit(losses, out_shardings=sharding.replicated(self._mesh))
        # A stream of its own: never the masks of a training step.
        self._key = self._replicated(jax.random.key_data(jax.random.fold_in(named_keys(config)["mask"], 2**31)))

    def run(self, params: Params) -> Result:
        """Computes both losses, over all rows and of each."""
        rows = batches(self._blocks, self._mesh, self._batch_size, self._max_rows)
        of_batches = [self._step(params, row, self._key, self._replicated(i)) for i, row in enumerate(rows)]
        columns = (np.concatenate(column) for column in zip(*jax.device_get(of_batches), strict=True))
        clean, masked, counts = (column[: min(self._max_rows, len(self._blocks))] for column in columns)
        examples = [
            {"row": i, "loss": float(clean[i] / n), "masked_loss": float(masked[i] / n), "tokens": int(n)}
            for i, n in enumerate(counts)
            if n
        ]
        return Result({"loss": ratio_interval(clean, counts), "masked_loss": ratio_interval(masked, counts)}, examples)

    def _replicated(self, value: int | jax.Array) -> jax.Array:
        return sharding.put_whole(sharding.replicated(self._mesh), np.asarray(value))


def _losses(
    definition: Definition,
    meap: Objective,
    chunk_size: int,
    is_everywhere: bool,
    params: Params,
    row: Row,
    key_data: jax.Array,
    index: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each row the summed loss on clean and on masked inputs, and its number of targets; [B] each.

    `is_everywhere`: masks fall everywhere, whatever the row says.
    """
    clean, key = clean_inputs(row), jax.random.wrap_key_data(key_data)
    if is_everywhere:
        row = row._replace(maskable=None)
    masked = make_inputs(row, meap, {"mask": key, "noise": key}, index)

    def summed(inputs: Inputs) -> jax.Array:
        losses_BT = definition.decoder(params).token_losses(
            inputs.tokens, inputs.visibility, inputs.targets, inputs.keep_embedding, chunk_size=chunk_size
        )
        return (losses_BT * inputs.loss_weights).sum(axis=1)

    return summed(clean), summed(masked), clean.loss_weights.sum(axis=1)
