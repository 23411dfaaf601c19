"""Trains one model: python -m meap_jax.main --config=configs/X.py [--workdir=DIR] [--config.field=value ...]."""

import json
import logging

import jax
import ml_collections
from etils import epath

from meap_jax import cli, sharding
from meap_jax.checkpoint import Checkpointer
from meap_jax.config import mixture, seed_of
from meap_jax.data.pipeline import TrainBatches
from meap_jax.evals import make_evaluators
from meap_jax.metrics import MetricsWriter, NoWriter
from meap_jax.run import make_folder, open_run, start, versions
from meap_jax.train import TrainState, compile_step, train_loop

_log = logging.getLogger("meap_jax.main")  # Not __name__, which is __main__ here.


def train(config: ml_collections.ConfigDict, workdir: epath.Path) -> TrainState:
    """Trains to `config.num_steps`, going on where an earlier run in `workdir` stopped; returns the final state.

    Args:
      config: checked by `meap_jax.config.check`.
      workdir: absolute; takes checkpoints, metrics.jsonl, TensorBoard files and the config.

    Raises:
      ConfigError, DataError: for what cannot work; nothing is changed then.
      Diverged: for a loss that is not finite; the last good checkpoint stays.
    """
    is_first = jax.process_index() == 0
    make_folder("workdir", workdir)

    # Mesh, model definition, data.
    run = open_run(config, workdir)
    _log.info("%s: %d parameters on %s", workdir, run.definition.config.num_parameters, dict(run.mesh.shape))
    _log.info("data %s (fingerprint %s)", run.prepared.folder, run.prepared.fingerprint[:12])

    # State: restored, imported or fresh, in this order.
    checkpointer = Checkpointer(workdir, config.checkpoint.keep)
    begin = start(run, checkpointer)

    # Data, from the block that comes next.
    batches = TrainBatches(
        run.prepared,
        mixture(config),
        seed=seed_of(config, "data"),
        batch_size=config.global_batch_size,
        sharding=sharding.batch_sharding(run.mesh),
    )
    if begin.data is not None:
        batches.set_state(begin.data)

    # Records.
    if is_first:
        (workdir / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
        (workdir / "versions.json").write_text(json.dumps(versions(), indent=2))
    writer = (
        MetricsWriter(
            workdir,
            start=begin.step,
            num_steps=config.num_steps,
            tokens_per_step=config.global_batch_size * config.seq_len,
        )
        if is_first
        else NoWriter()
    )

    def save(step: int, state: TrainState) -> None:
        meta = {
            "config": config.to_dict(),
            "fingerprint": run.prepared.fingerprint,
            "tokenizer": run.prepared.tokenizer_hash,
            "data": batches.get_state(),
        }
        checkpointer.save(step, state, meta)

    # Steps.
    try:
        with jax.set_mesh(run.mesh):
            return train_loop(
                config,
                begin.state,
                batches,
                compile_step(config, run.definition, run.mesh),
                start=begin.step,
                evaluators=make_evaluators(config, run.definition, run.prepared, run.mesh, "validation"),
                writer=writer,
                save=save,
            )
    finally:
        checkpointer.close()
        writer.close()


def command(argv: list[str]) -> None:
    """The door."""
    config, workdir = cli.parse_config(argv)
    train(config, workdir)


if __name__ == "__main__":
    cli.run_command(command, joins_hosts=True)
