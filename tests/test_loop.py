"""The loop: what it records, saves and evaluates when, and what it does when something goes wrong."""

import pathlib
import types
from unittest import mock

import numpy as np
import pytest

from meap_jax import loop as loop_lib
from meap_jax.errors import Diverged, Preempted
from meap_jax.loop import Guards, train_loop
from meap_jax.numerics import Monitor
from meap_jax.results import Interval, Result
from meap_jax.timing import Clock, Trace
from meap_jax.train import TrainState
from meap_jax.watchdog import Watchdog
from tiny_runs import tiny_config

# An evaluator that always has the same answer.
QUIZ = types.SimpleNamespace(run=lambda params: Result({"answer": Interval(42.0, None, None)}, []))


def fake_step(state, batch):
    """A step whose loss is its number."""
    state = state._replace(step=state.step + 1)
    return state, {"loss": np.float32(state.step), "grad_norm": np.float32(1), "learning_rate": np.float32(0.1)}


class FakeSaver:
    """Keeps states in memory; a save fails as often as `failures` says."""

    def __init__(self, recorder, failures=()):
        self.recorder, self.failures, self.saved, self.failed = recorder, list(failures), {}, False

    def save(self, step, state, loss=None):
        self.recorder.save(step, state, loss)
        self.failed = bool(self.failures) and self.failures.pop(0)
        if not self.failed:
            self.saved[step] = state

    def is_to_save_again(self):
        return self.failed

    def finish(self):
        return not self.failed

    def go_back(self):
        newest = max(self.saved)
        return newest, self.saved[newest], {}


def loop(step_fn=fake_step, evaluators=(), clock=None, batches=None, recorder=None, guards=None, failures=(), **fields):
    """Runs the loop; returns a mock that its writer and its saves were calls of."""
    recorder, config = recorder or mock.Mock(), tiny_config(**fields)
    writer = types.SimpleNamespace(
        write=recorder.write, progress=recorder.progress, flush=recorder.flush, rewind=recorder.rewind
    )
    watchdog = Watchdog(times_median=20, least_seconds=0, other_seconds=60)
    given = Guards(Monitor(config.numerics), watchdog)._replace(**(guards or {}))
    train_loop(
        config, TrainState(np.int32(0), {}, (), {}), batches or iter(lambda: {}, None), step_fn,
        start=0, evaluators=dict(evaluators), writer=writer, saver=FakeSaver(recorder, failures),
        guards=given, clock=clock or Clock(), trace=Trace(pathlib.Path(), start=1, num_steps=0),
    )  # fmt: skip
    return recorder


def args_of(calls):
    return [call.args for call in calls.call_args_list]


def test_the_loop_writes_every_nth_step_once_with_evaluations_and_flushes_before_a_save_of_it():
    every = {"num_steps": 10, "log.every": 3, "eval.every": 4, "checkpoint.every": 6}
    recorder = loop(evaluators={"quiz": QUIZ}, **every)
    records = args_of(recorder.write)
    assert [step for step, _ in records] == [1, 3, 4, 6, 8, 9, 10]
    assert all(values["loss"] == step for step, values in records)
    assert [step for step, values in records if values.get("quiz/answer") == 42.0] == [4, 8, 10]
    assert [(step, int(state.step)) for step, state, _ in args_of(recorder.save)] == [(6, 6), (10, 10)]
    names = [call[0] for call in recorder.mock_calls if call[0] != "progress"]
    assert names == ["write"] * 4 + ["flush", "save"] + ["write"] * 3 + ["flush", "save"]


def with_values(step, **values):
    """A step function whose metrics are others at some steps: {name: {step: value}}."""

    def step_fn(state, batch):
        state, metrics = step(state, batch)
        own = {name: np.float32(at[int(state.step)]) for name, at in values.items() if int(state.step) in at}
        return state, metrics | own

    return step_fn


@pytest.mark.parametrize("name, value", [("loss", np.nan), ("grad_norm", np.inf)])
def test_a_step_that_is_not_finite_is_skipped_up_to_a_limit_with_its_data_in_the_log(name, value, caplog):
    bad = with_values(fake_step, **{name: dict.fromkeys((3, 4, 6, 7, 8), value)})
    rows = {"rows_of": lambda step: f"rows of {step}"}
    recorder = mock.Mock()
    with pytest.raises(Diverged, match="step 8: .* in 3 steps in a row, where numerics.max_skipped is 2"):
        loop(bad, recorder=recorder, guards=rows, **{"checkpoint.every": 5, "numerics.max_skipped": 2})
    skipped = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert [text.split(":")[0] for text in skipped] == ["step 3", "step 4", "step 6", "step 7"]
    assert "(2 of at most 2 in a row), host 0 of 1; the data is rows of 4" in skipped[1]
    assert [step for step, *_ in args_of(recorder.save)] == [5]


@pytest.mark.parametrize("name", ["param_norm", "update_norm"])
def test_parameters_that_are_not_finite_stop_the_run_and_are_never_saved(name):
    recorder = mock.Mock()
    with pytest.raises(Diverged, match=f"step 10: {name} is inf, which must be finite"):
        loop(with_values(fake_step, **{name: {10: np.inf}}), recorder=recorder, **{"checkpoint.every": 5})
    assert [step for step, *_ in args_of(recorder.save)] == [5]


def test_a_validation_loss_that_is_not_finite_stops_the_run_and_is_never_saved():
    quiz = types.SimpleNamespace(run=lambda params: Result({"masked_loss": Interval(np.nan, None, None)}, []))
    recorder = mock.Mock()
    with pytest.raises(Diverged, match="step 4: validation_text/masked_loss is nan, which must be finite"):
        loop(evaluators={"validation_text": quiz}, recorder=recorder, **{"eval.every": 4, "checkpoint.every": 4})
    assert not recorder.save.called


def test_a_save_is_told_the_mean_validation_loss_of_its_step_alone():
    losses = iter([4.0, 2.0, 3.0, 5.0])
    text, code = (
        types.SimpleNamespace(run=lambda params: Result({"loss": Interval(next(losses), None, None)}, []))
        for _ in range(2)
    )
    every = {"num_steps": 8, "eval.every": 4, "checkpoint.every": 2}
    recorder = loop(evaluators={"validation_text": text, "validation_code": code}, **every)
    assert [(step, loss) for step, _, loss in args_of(recorder.save)] == [(2, None), (4, 3.0), (6, None), (8, 4.0)]


SPIKES = {"numerics.spike": 50.0, "numerics.max_rewinds": 1, "checkpoint.every": 5, "num_steps": 20, "log.every": 1}


def test_after_a_spike_the_run_goes_back_to_its_last_save_and_leaves_the_data_between_out():
    data = iter(range(1, 100))
    seen = []

    def step_fn(state, batch):
        seen.append((int(state.step) + 1, batch))
        state, metrics = fake_step(state, batch)
        return state, metrics | {"loss": np.float32(1000 if batch == 13 else 2 + batch % 3)}

    recorder = loop(step_fn, batches=data, **SPIKES)
    # Step 14 is dispatched when the loss of step 13 comes: its batch is left out too.
    assert seen == [(i, i) for i in range(1, 15)] + [(i, i + 4) for i in range(11, 21)]
    assert args_of(recorder.rewind) == [(10,)]
    records = [step for step, _ in args_of(recorder.write)]
    assert records == [*range(1, 13), *range(11, 21)]
    assert [step for step, *_ in args_of(recorder.save)] == [5, 10, 15, 20]


def test_spikes_after_the_last_rewind_are_logged_and_the_run_goes_on(caplog):
    data = iter(range(1, 100))

    def step_fn(state, batch):
        state, metrics = fake_step(state, batch)
        return state, metrics | {"loss": np.float32(1000 if batch in (13, 30) else 2 + batch % 3)}

    recorder = loop(step_fn, batches=data, **SPIKES | {"num_steps": 30})
    assert args_of(recorder.rewind) == [(10,)]
    said = [record.getMessage() for record in caplog.records if "is a spike" in record.getMessage()]
    assert len(said) == 2 and "goes back to its last checkpoint" in said[0] and "the run goes on" in said[1]


def test_a_save_that_failed_is_repeated_after_the_next_step():
    recorder = loop(failures=[False, True, True], **{"num_steps": 12, "checkpoint.every": 4})
    assert [step for step, *_ in args_of(recorder.save)] == [4, 8, 9, 10, 12]


def test_the_last_save_is_repeated_until_it_is_there():
    recorder = loop(failures=[True, True], **{"num_steps": 4, "checkpoint.every": 4})
    assert [step for step, *_ in args_of(recorder.save)] == [4, 4, 4]


def test_a_notice_saves_once_after_the_step_and_ends_the_loop():
    recorder = mock.Mock()
    with pytest.raises(Preempted, match="step 7 of 20 is saved"):
        loop(recorder=recorder, guards={"is_preempted": lambda step: step >= 7}, **{"checkpoint.every": 5})
    assert [(step, int(state.step)) for step, state, _ in args_of(recorder.save)] == [(5, 5), (7, 7)]


def test_a_notice_at_the_last_step_ends_as_any_run():
    recorder = loop(guards={"is_preempted": lambda step: step >= 4}, **{"num_steps": 4})
    assert [step for step, *_ in args_of(recorder.save)] == [4]


def test_a_state_that_can_not_be_trusted_is_not_saved():
    def check(state, step, is_to_save):
        if is_to_save:
            raise Diverged(f"copies differ after step {step}")

    recorder = mock.Mock()
    with pytest.raises(Diverged, match="after step 5"):
        loop(recorder=recorder, guards={"check": check}, **{"checkpoint.every": 5})
    assert not recorder.save.called


def test_metrics_are_fetched_after_the_next_step_was_dispatched():
    recorder, seen = mock.Mock(), []

    def spying(state, batch):
        seen.append(recorder.write.call_count)
        return fake_step(state, batch)

    loop(spying, recorder=recorder, **{"num_steps": 6, "log.every": 1})
    assert seen == [0, 0, 1, 2, 3, 4]  # When step n is dispatched, step n - 2 is the last one on record.


def test_a_record_has_the_time_of_steps_apart_from_start_compilation_evaluations_and_saves(monkeypatch):
    """Seconds of this loop: start 5, compilation 10, data 1/4 a step, metrics 3 a step, evaluation 7."""
    time = [0.0]

    def passes(seconds, result=None):
        time[0] += seconds
        return result

    slow_quiz = types.SimpleNamespace(run=lambda params: passes(7.0, QUIZ.run(params)))

    def step_fn(state, batch):
        return passes(0.0 if state.step else 10.0, fake_step(state, batch))

    clock = Clock(now=lambda: time[0])
    passes(5.0)
    monkeypatch.setattr(loop_lib.jax, "device_get", lambda metrics: passes(3.0, metrics))
    batches, every = iter(lambda: passes(0.25, {}), None), {"num_steps": 4, "log.every": 2}
    recorder = loop(step_fn, {"quiz": slow_quiz}, clock, batches, **every)

    names = ("step_seconds", "step_seconds_p50", "step_seconds_p90", "data_wait", "goodput")
    # Step 2 is dispatched, and its data waited for, before the metrics of step 1 arrive; so step 4 waits for none.
    assert {step: [values[name] for name in names] for step, values in args_of(recorder.write)} == {
        1: pytest.approx([3.5, 3.5, 3.5, 0.5 / 3.5, 3 / 18.5]),
        2: pytest.approx([3.25, 3.25, 3.25, 0.25 / 3.25, 6 / 21.75]),
        4: pytest.approx([3.125, 3.125, 3.225, 0.25 / 6.25, 12 / 35]),
    }
    assert clock.summary() == "35.0 s: steps 12.0 s, compilation 10.0 s, evaluations 7.0 s, start 5.0 s, data 1.0 s"
