"""Trains one model: python -m meap_jax.main --config=configs/X.py [--workdir=DIR] [--config.field=value ...]."""

import contextlib
import functools
import json
import logging

import jax
import ml_collections
from etils import epath

from meap_jax import cli, peers, sharding
from meap_jax.checkpoint import Checkpointer, Keep
from meap_jax.config import mixture, seed_of
from meap_jax.data.pipeline import TrainBatches
from meap_jax.errors import ConfigError
from meap_jax.evals import Setting, check_tasks, make_evaluators
from meap_jax.export import check_export
from meap_jax.hardware import detect
from meap_jax.lease import Lease
from meap_jax.loop import Guards, train_loop
from meap_jax.metrics import PROFILE_FOLDER, MetricsWriter, NoWriter, StepWork, local_folder, model_flops
from meap_jax.models import save_tokenizer, write_config
from meap_jax.numerics import Monitor, check_replicas, taken_twice
from meap_jax.objective import Objective
from meap_jax.paths import write_whole
from meap_jax.preemption import notices
from meap_jax.run import Run, check_hosts, held_by_run, make_folder, open_run, versions
from meap_jax.saver import RunSaver, is_written_for_hub, write_for_hub
from meap_jax.start import start
from meap_jax.timing import Clock, Trace, process_began
from meap_jax.train import TrainState, compile_step
from meap_jax.watchdog import Watchdog

_log = logging.getLogger("meap_jax.main")  # Not __name__, which is __main__ here.


def train(config: ml_collections.ConfigDict, workdir: epath.Path, began: float | None = None) -> TrainState:
    """Trains to `config.num_steps`, going on where an earlier run in `workdir` stopped; returns the final state.

    Args:
      config: checked by `meap_jax.config.check`.
      workdir: absolute; takes checkpoints, metrics.jsonl, TensorBoard files and the config.
      began: since when goodput counts, on the clock of `time.perf_counter`; default: now.

    Raises:
      ConfigError, DataError: for what cannot work, or a workdir in which another run is going on; nothing is changed
        then.
      Diverged, SaveFailed: for numbers or a disk with which training can't go on; the last good checkpoint stays.
      Preempted: the machines are to be taken away; the state is saved.
    """
    clock = Clock(began)
    tasks = check_tasks(config.eval.tasks)
    if config.checkpoint.keep_best and "validation" not in tasks:
        raise ConfigError(
            f"checkpoint.keep_best is {config.checkpoint.keep_best}, but eval.tasks is {config.eval.tasks!r}, without "
            "validation, whose loss says which are best: add it, or set checkpoint.keep_best=0."
        )
    check_hosts(config, workdir)
    make_folder("workdir", workdir)
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(held_by_run(workdir))

        # Mesh, model definition, data.
        run = open_run(config, workdir)
        config = run.config  # With the steps of its epochs.
        _log.info("%s: %d parameters on %s", workdir, run.definition.config.num_parameters, dict(run.mesh.shape))
        _log.info("data %s (fingerprint %s)", run.prepared.folder, run.prepared.fingerprint[:12])
        if config.checkpoint.export != "none":
            check_export(run.model, run.prepared.tokenizer, config.checkpoint.export)

        # State: restored, imported or fresh, in this order.
        keep = Keep(config.checkpoint.keep, config.checkpoint.keep_every, config.checkpoint.keep_best)
        checkpointer = Checkpointer(workdir, keep)
        stack.callback(checkpointer.close)
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
        writer = make_writer(run, begin.step)
        stack.callback(writer.close)
        trace = make_trace(run, begin.step)
        stack.callback(trace.close)

        # What watches over the run.
        monitor = Monitor(config.numerics, begin.monitor)
        saver = RunSaver(run, checkpointer, batches, begin, monitor)
        watchdog = Watchdog(
            **config.watchdog,
            write_stacks=functools.partial(peers.ask_for_stacks, workdir / "stacks"),
            stop=peers.stop,
        )
        stack.callback(watchdog.close)
        guards = Guards(
            monitor, watchdog, stack.enter_context(notices()), functools.partial(check, run, lease), saver.rows_of
        )

        # Steps.
        step_fn = compile_step(config, run.definition, run.mesh)
        if config.checkpoint.export != "none" and begin.step and not is_written_for_hub(run, begin.step):
            write_for_hub(run, begin.step, begin.state.params, begin.origin)  # It was interrupted.
        with peers.telling(cli.of_the_system), jax.set_mesh(run.mesh):
            state = train_loop(
                config,
                begin.state,
                batches,
                taken_twice(step_fn) if config.debug.check_determinism else step_fn,
                start=begin.step,
                evaluators=make_evaluators(Setting.of(run, "validation", begin.origin), config.eval.tasks),
                writer=writer,
                saver=saver,
                guards=guards,
                clock=clock,
                trace=trace,
            )
        _log.info("%s", clock.summary())
        return state


def make_writer(run: Run, step: int) -> MetricsWriter | NoWriter:
    """Writes what a run leaves beside checkpoints, and makes the writer of its records after a step."""
    if jax.process_index() != 0:
        return NoWriter()
    config, workdir = run.config, run.workdir
    write_config(workdir, config)
    save_tokenizer(workdir, run.prepared.tokenizer)
    write_whole(workdir / "versions.json", json.dumps(versions(), indent=2))
    tokens = config.global_batch_size * config.seq_len
    flops = model_flops(run.definition.config, config.seq_len, tokens * Objective.of(config).num_passes)
    chip = detect(run.mesh.devices.flat[0].device_kind)
    work = StepWork(tokens=tokens, flops=flops, num_devices=run.mesh.size, peak_flops=chip and chip.peak_flops)
    return MetricsWriter(workdir, start=step, num_steps=config.num_steps, work=work)


def make_trace(run: Run, step: int) -> Trace:
    """Makes the trace that the config asks for, on the first process, of a run that goes on after a step."""
    profile = run.config.profile
    if profile.num_steps and step >= profile.start:
        _log.info("no trace: profile.start is %d, and the run goes on after step %d", profile.start, step)
    num_steps = profile.num_steps if jax.process_index() == 0 else 0
    return Trace(local_folder(run.workdir) / PROFILE_FOLDER, start=profile.start, num_steps=num_steps)


def check(run: Run, lease: Lease | None, state: TrainState, step: int, is_to_save: bool) -> None:
    """Makes sure that the workdir is still this run's, and that devices agree, if that is to be compared.

    Raises:
      LeaseLost, Diverged: they are not.
    """
    if lease is not None:
        lease.check()
    every = run.config.numerics.check_replicas
    if every and (is_to_save or step % every == 0):
        check_replicas(step, state, run.mesh)


def command(argv: list[str]) -> None:
    """Trains the model of `--config` in `--workdir`."""
    config, workdir = cli.parse_config(argv)
    train(config, workdir, process_began())


if __name__ == "__main__":
    cli.run_command(command, joins_hosts=True)
