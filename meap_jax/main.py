"""Trains one model: python -m meap_jax.main --config=configs/X.py [--workdir=DIR] [--config.field=value ...]."""

import json
import logging
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from meap_jax import cli, sharding
from meap_jax.checkpoint import Checkpointer
from meap_jax.config import mixture, seed_of
from meap_jax.data.pipeline import TrainBatches
from meap_jax.evals import Setting, check_tasks, make_evaluators
from meap_jax.export import check_export, export_stored
from meap_jax.hardware import detect
from meap_jax.metrics import PROFILE_FOLDER, MetricsWriter, NoWriter, StepWork, local_folder, model_flops
from meap_jax.model.decoder import Params
from meap_jax.models import held_model, save_tokenizer, write_config
from meap_jax.objective import Objective
from meap_jax.run import Run, make_folder, open_run, versions
from meap_jax.start import start
from meap_jax.timing import Clock, Trace, process_began
from meap_jax.train import TrainState, compile_step, train_loop

EXPORT_FOLDER = "export"  # In the workdir.

_log = logging.getLogger("meap_jax.main")  # Not __name__, which is __main__ here.


def train(config: ml_collections.ConfigDict, workdir: epath.Path, began: float | None = None) -> TrainState:
    """Trains to `config.num_steps`, going on where an earlier run in `workdir` stopped; returns the final state.

    Args:
      config: checked by `meap_jax.config.check`.
      workdir: absolute; takes checkpoints, metrics.jsonl, TensorBoard files and the config.
      began: since when goodput counts, on the clock of `time.perf_counter`; default: now.

    Raises:
      ConfigError, DataError: for what cannot work; nothing is changed then.
      Diverged: for a loss that is not finite; the last good checkpoint stays.
    """
    clock = Clock(began)
    is_first = jax.process_index() == 0
    check_tasks(config.eval.tasks)
    make_folder("workdir", workdir)

    # Mesh, model definition, data.
    run = open_run(config, workdir)
    config = run.config  # With the steps of its epochs.
    _log.info("%s: %d parameters on %s", workdir, run.definition.config.num_parameters, dict(run.mesh.shape))
    _log.info("data %s (fingerprint %s)", run.prepared.folder, run.prepared.fingerprint[:12])

    if config.checkpoint.export != "none":
        check_export(run.model, run.prepared.tokenizer, config.checkpoint.export)

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
        write_config(workdir, config)
        save_tokenizer(workdir, run.prepared.tokenizer)
        (workdir / "versions.json").write_text(json.dumps(versions(), indent=2))
    tokens = config.global_batch_size * config.seq_len
    flops = model_flops(run.definition.config, config.seq_len, tokens * Objective.of(config).num_passes)
    chip = detect(run.mesh.devices.flat[0].device_kind)
    work = StepWork(tokens=tokens, flops=flops, num_devices=run.mesh.size, peak_flops=chip and chip.peak_flops)
    writer = MetricsWriter(workdir, start=begin.step, num_steps=config.num_steps, work=work) if is_first else NoWriter()
    if config.profile.num_steps and begin.step >= config.profile.start:
        _log.info("no trace: profile.start is %d, and the run goes on after step %d", config.profile.start, begin.step)
    trace = Trace(
        local_folder(workdir) / PROFILE_FOLDER,
        start=config.profile.start,
        num_steps=config.profile.num_steps if is_first else 0,
    )

    def save(step: int, state: TrainState) -> None:
        meta = {
            "config": config.to_dict(),
            "fingerprint": run.prepared.fingerprint,
            "tokenizer": run.prepared.tokenizer_hash,
            "data": batches.get_state(),
            "origin": begin.origin,
        }
        checkpointer.save(step, state, meta)
        if config.checkpoint.export != "none":
            write_for_hub(run, step, state.params, begin.origin)

    # Steps.
    try:
        if config.checkpoint.export != "none" and begin.step and not is_written_for_hub(run, begin.step):
            write_for_hub(run, begin.step, begin.state.params, begin.origin)  # It was interrupted.
        with jax.set_mesh(run.mesh):
            state = train_loop(
                config,
                begin.state,
                batches,
                compile_step(config, run.definition, run.mesh),
                start=begin.step,
                evaluators=make_evaluators(Setting.of(run, "validation", begin.origin), config.eval.tasks),
                writer=writer,
                save=save,
                clock=clock,
                trace=trace,
            )
        _log.info("%s", clock.summary())
        return state
    finally:
        trace.close()
        checkpointer.close()
        writer.close()


def write_for_hub(run: Run, step: int, params: Params, origin: dict[str, Any]) -> None:
    """Writes the model of a step as `meap_jax.convert export` would; what is there already is replaced."""
    stored = held_model(run.model, params, run.prepared.tokenizer, step, {"origin": origin})
    adapter = run.config.checkpoint.export
    with jax.transfer_guard("allow"):  # Weights are to come to the host.
        export_stored(lambda: stored, run.workdir, _export_folder(run, step), adapter=adapter, replaces=True)


def is_written_for_hub(run: Run, step: int) -> bool:
    """Whether the first process has written the model of a step; the same on every process."""
    is_there = np.array(_export_folder(run, step).exists())
    return bool(multihost_utils.broadcast_one_to_all(is_there) if jax.process_count() > 1 else is_there)


def _export_folder(run: Run, step: int) -> epath.Path:
    return epath.Path(local_folder(run.workdir)) / EXPORT_FOLDER / str(step)


def command(argv: list[str]) -> None:
    """Trains the model of `--config` in `--workdir`."""
    config, workdir = cli.parse_config(argv)
    train(config, workdir, process_began())


if __name__ == "__main__":
    cli.run_command(command, joins_hosts=True)
