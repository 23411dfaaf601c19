"""The loop around the training step: metrics, evaluations and checkpoints on the way, and what becomes of trouble."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import ml_collections
import numpy as np

from meap_jax.config import is_due
from meap_jax.errors import Preempted
from meap_jax.numerics import Monitor, Spike, check_finite
from meap_jax.results import Result
from meap_jax.rows import Row
from meap_jax.timing import Clock, Trace
from meap_jax.train import Metrics, TrainState
from meap_jax.watchdog import Watchdog


@runtime_checkable
class Evaluator(Protocol):
    """Measures a model; the loop knows no evaluator by name."""

    def run(self, params: Any) -> Result:
        """Measures the model with these parameters."""


@runtime_checkable
class Writer(Protocol):
    """Records numbers of a step; see `meap_jax.metrics`."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records the numbers of optimizer step `step`, counted from 1."""

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Shows them on the terminal."""

    def rewind(self, step: int) -> None:
        """Forgets what was recorded of later steps than this."""

    def flush(self) -> None:
        """Writes everything recorded so far to disk."""


@runtime_checkable
class Saver(Protocol):
    """Keeps states; see `meap_jax.saver`."""

    def save(self, step: int, state: TrainState, loss: float | None = None) -> None:
        """Saves a state; `loss` is that on validation data, if it was measured."""

    def is_to_save_again(self) -> bool:
        """Whether the last save failed in the background, and the state of now is to be saved in its place."""

    def finish(self) -> bool:
        """Waits for the last save; returns whether it is there, and needn't be repeated."""

    def go_back(self) -> tuple[int, TrainState, dict[str, Any]]:
        """Returns the newest state that was saved, its step, and what the monitor remembered then.

        If nothing was saved before, it is the state of the beginning. Data goes on behind what was read.
        """


class Guards(NamedTuple):
    """What watches over a run."""

    monitor: Monitor
    watchdog: Watchdog
    is_preempted: Callable[[int], bool] = lambda step: False  # Asked after every step.
    # Raises if the state after a step, which is to be saved or not, can't be trusted.
    check: Callable[[TrainState, int, bool], None] = lambda state, step, is_to_save: None
    rows_of: Callable[[int], str] = lambda step: "unknown"  # Says which data a step was trained on.


def train_loop(
    config: ml_collections.ConfigDict,
    state: TrainState,
    batches: Iterator[Row],
    step_fn: Callable[[TrainState, Row], tuple[TrainState, Metrics]],
    *,
    start: int,
    evaluators: Mapping[str, Evaluator],
    writer: Writer,
    saver: Saver,
    guards: Guards,
    clock: Clock,
    trace: Trace,
) -> TrainState:
    """Runs steps `start + 1` to `config.num_steps`, with metrics, evaluations and checkpoints on the way.

    A step is dispatched before the metrics of the one before are fetched, so that the device never waits for the host.
    Before a save they are fetched, must be finite, and are flushed to disk. `clock` measures the times of a record.

    Raises:
      Diverged: naming the step, for numbers from which no training can go on. What was saved before stays.
      SaveFailed: nothing can be saved.
      Preempted: the machines are to be taken away; the state is saved.
    """
    pending: tuple[int, Metrics] | None = None
    validation: dict[int, float] = {}  # The loss at the last step at which it was measured.

    def settle(evaluate: bool = False) -> None:
        """Fetches, judges and records the metrics of the last step, with its evaluations if they are due."""
        nonlocal pending
        if pending is None:
            return
        (step, on_device), pending = pending, None
        values = {name: float(value) for name, value in jax.device_get(on_device).items()}
        clock.arrived()
        is_to_go_back = guards.monitor.judge(step, values, functools.partial(guards.rows_of, step))
        if is_to_go_back:
            raise Spike
        if evaluate:
            with clock.aside("evaluations"), guards.watchdog.aside(f"the evaluation of step {step}"):
                values |= measured(evaluators, state, step)
            validation.clear()
            losses = [
                value for name, value in values.items() if name.startswith("validation_") and name.endswith("/loss")
            ]
            if losses:
                validation[step] = float(np.mean(losses))
        if evaluate or step % config.log.every == 0 or step in (1, config.num_steps):
            writer.write(step, {**values, **clock.report()})
        writer.progress(step, values)

    def save(step: int) -> None:
        settle()
        with clock.aside("saves"), guards.watchdog.aside(f"the save of step {step}"):
            writer.flush()
            saver.save(step, state, validation.get(step))

    def device_is_busy() -> bool:
        """Whether the last step that was dispatched is still to be done."""
        arrays = (x for x in pending[1].values() if isinstance(x, jax.Array)) if pending else ()
        return not all(x.is_ready() for x in arrays)  # type: ignore[attr-defined]  # Not in jax's stubs.

    clock.start_steps()
    step, first = start, start + 1
    with jax.transfer_guard("disallow"):
        while step < config.num_steps:
            step += 1
            try:
                guards.watchdog.step(step)
                with clock.aside("traces"):
                    trace.before(step, state)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    with clock.waiting_for_data(device_is_busy):
                        batch = next(batches)
                    with clock.aside("compilation") if step == first else contextlib.nullcontext():
                        state, metrics = step_fn(state, batch)
                    settle()
                pending = (step, metrics)
                with clock.aside("traces"):
                    trace.after(step, state)

                if is_due(config, config.eval.every, step):
                    settle(evaluate=True)
                is_preempted = guards.is_preempted(step)
                is_to_save = is_preempted or is_due(config, config.checkpoint.every, step) or saver.is_to_save_again()
                guards.check(state, step, is_to_save)
                if is_to_save:
                    save(step)
            except Spike:
                pending = None
                del state  # There may be no room for two of them.
                with guards.watchdog.aside("the way back to the last checkpoint"):
                    step, state, remembered = saver.go_back()
                guards.monitor.go_back(remembered)
                writer.rewind(step)
                continue
            if step == config.num_steps or is_preempted:
                while not saver.finish():
                    save(step)
            if is_preempted and step < config.num_steps:
                raise Preempted(f"step {step} of {config.num_steps} is saved")
    return state


def measured(evaluators: Mapping[str, Evaluator], state: TrainState, step: int) -> dict[str, float]:
    """What evaluators measure of a state: {"validation_text/loss": 2.5, ...}.

    Raises:
      Diverged: a validation loss is not finite.
    """
    values: dict[str, float] = {}
    for name, evaluator in evaluators.items():
        values |= {f"{name}/{key}": metric.estimate for key, metric in evaluator.run(state.params).metrics.items()}
    for name, value in values.items():
        if name.startswith("validation_") and name.endswith("loss"):
            check_finite(step, name, value)
    return values
