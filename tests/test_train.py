"""The training step: against a step written out, over meshes, with accumulation, and the loop around it."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meap_jax import sharding, train
from meap_jax.config import base
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from meap_jax.model.visibility import causal
from meap_jax.objective import Objective, make_inputs, named_keys
from meap_jax.optimizer import make_optimizer
from meap_jax.results import Interval, Result
from meap_jax.rows import Row
from meap_jax.timing import Clock, Trace

B, T, V = 8, 16, 64


def tiny_config(**overrides):
    c = base()
    c.model.update(dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, embed_dim=32, mlp_dim=48, vocab_size=V))
    c.objective.mask_id = 3
    c.global_batch_size, c.seq_len, c.num_steps = B, T, 20
    c.optimizer.learning_rate = 1e-2
    c.update_from_flattened_dict(overrides)
    return c


def random_batch(seed=0, padding=True):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, V, (B, T + 1)).astype(np.int32)
    segment_ids = np.repeat(np.array([[1] * 9 + [2] * 8]), B, axis=0).astype(np.int32)
    if padding:
        segment_ids[::2, -4:] = 0
    return Row(tokens, segment_ids)


def on_mesh(mesh, batch):
    return jax.tree.map(functools.partial(sharding.put_whole, sharding.batch_sharding(mesh)), batch)


def run_steps(config, num_steps=3, devices=None):
    """Losses and final parameters of a few steps on a mesh."""
    mesh = sharding.make_mesh(config.mesh, devices)
    definition = define(ModelConfig.of(config.model))
    shardings = train.state_shardings(config, definition, mesh)
    state = jax.jit(lambda: train.init_state(config, definition), out_shardings=shardings)()
    step = train.compile_step(config, definition, mesh)
    losses = []
    with jax.set_mesh(mesh):
        for i in range(num_steps):
            batch = on_mesh(mesh, random_batch(i))
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def on_one_device():
    return run_steps(tiny_config(), devices=jax.devices()[:1])


def test_a_step_is_mask_forward_loss_gradient_update_as_written_out_here():
    config = tiny_config()
    definition = define(ModelConfig.of(config.model))
    optimizer, objective = make_optimizer(config), Objective.of(config)
    state = jax.jit(lambda: train.init_state(config, definition))()
    batch = random_batch()

    inputs = jax.jit(lambda b: make_inputs(b, objective, named_keys(config), jnp.int32(0)))(batch)

    def mean_loss(params):
        logits = definition.apply(params, inputs.tokens, causal(inputs.tokens, inputs.segment_ids))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), inputs.targets[..., None], -1)[..., 0]
        return -(chosen * inputs.loss_weights).sum() / inputs.loss_weights.sum()

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    updates, _ = jax.jit(optimizer.update)(grads, state.opt_state, state.params)
    expected = jax.tree.map(np.add, state.params, jax.device_get(updates))

    new_state, metrics = jax.jit(train.step_function(config, definition))(state, batch)
    assert int(new_state.step) == 1
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    assert metrics["mask_fraction"] > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), new_state.params, expected)


@pytest.mark.parametrize(
    "mesh",
    [
        dict(data=8),
        dict(data=2, fsdp=2, tensor=2),
        dict(data=1, fsdp=2, tensor=4),  # 2 kv heads on 4 devices: replicated
        dict(data=2, fsdp=1, tensor=2, context=2),
        dict(data=1, fsdp=2, tensor=2, context=2),
        dict(data=2, fsdp=1, tensor=1, context=4),
        dict(data=1, fsdp=-1),
    ],
    ids=str,
)
def test_the_same_seed_gives_the_same_losses_on_one_device_and_on_eight(mesh, on_one_device):
    config = tiny_config()
    config.mesh.update(mesh)
    losses, params = run_steps(config)
    np.testing.assert_allclose(losses, on_one_device[0], rtol=1e-5)
    # Adam divides by the root of tiny second moments, so that a rounding difference can grow to some 1e-4 of a step.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), params, on_one_device[1])


def test_two_runs_on_one_mesh_are_bit_equal():
    config = tiny_config()
    config.mesh.update(dict(data=1, fsdp=2, tensor=2, context=2))
    (losses, params), (losses_again, params_again) = run_steps(config), run_steps(config)
    assert losses == losses_again
    jax.tree.map(np.testing.assert_array_equal, params, params_again)


@pytest.mark.parametrize("devices", [1, 2])
def test_accumulation_equals_the_large_batch_though_micro_batches_differ_in_padding(devices, on_one_device):
    config = tiny_config(grad_accum_steps=4)
    losses, params = run_steps(config, devices=jax.devices()[:devices])
    np.testing.assert_allclose(losses, on_one_device[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), params, on_one_device[1])


def test_a_traced_ratio_replaces_the_configs_and_compiles_once():
    config = tiny_config()
    definition = define(ModelConfig.of(config.model))
    traces = []

    @jax.jit
    def step(state, batch, ratio):
        traces.append(1)
        return train.step_function(config, definition)(state, batch, ratio)

    state, batch = jax.jit(lambda: train.init_state(config, definition))(), random_batch(padding=False)
    fractions = [float(step(state, batch, jnp.float32(r))[1]["mask_fraction"]) for r in (0.0, 0.25, 0.5)]
    assert len(traces) == 1
    # Segments of 9 and 7 inputs: floor(.25 * 9) + floor(.25 * 7) = 2 + 1 of 16, and 4 + 3 at one half.
    np.testing.assert_allclose(fractions, [0, 3 / 16, 7 / 16], rtol=1e-6)


def test_the_state_is_donated_and_stays_where_it_was():
    config = tiny_config()
    mesh = sharding.make_mesh(config.mesh)
    definition = define(ModelConfig.of(config.model))
    shardings = train.state_shardings(config, definition, mesh)
    state = jax.jit(lambda: train.init_state(config, definition), out_shardings=shardings)()
    batch = on_mesh(mesh, random_batch())
    with jax.set_mesh(mesh):
        new_state, _ = train.compile_step(config, definition, mesh)(state, batch)
    assert state.params["head"].is_deleted()
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(x.sharding)), new_state, shardings
    )


@pytest.mark.parametrize("mesh", [dict(data=8), dict(data=1, fsdp=4, tensor=2)], ids=str)
def test_the_step_holds_no_second_copy_of_the_state(mesh):
    config = tiny_config(**{"model.embed_dim": 64, "model.mlp_dim": 512})
    config.mesh.update(mesh)
    of_devices = sharding.make_mesh(config.mesh)
    definition = define(ModelConfig.of(config.model))
    state, batch = train.abstract_inputs(config, definition, of_devices)
    with jax.set_mesh(of_devices):
        memory = train.compile_step(config, definition, of_devices).lower(state, batch).compile().memory_analysis()
    bytes_of_state = sum(
        x.dtype.itemsize * np.prod(x.sharding.shard_shape(x.shape), dtype=int) for x in jax.tree.leaves(state)
    )
    assert memory.alias_size_in_bytes >= bytes_of_state
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < bytes_of_state / 20  # Metrics, and no more.


def test_moments_at_rest_in_bfloat16_take_half_the_memory_and_train_alike(on_one_device):
    config = tiny_config(**{"optimizer.moment_dtype": "bfloat16"})
    definition = define(ModelConfig.of(config.model))
    state = jax.eval_shape(lambda: train.init_state(config, definition))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert {x.dtype for x in moments} == {jnp.dtype(jnp.bfloat16)} and len(moments) == 2 * len(
        jax.tree.leaves(state.params)
    )
    losses, _ = run_steps(config, devices=jax.devices()[:1])
    np.testing.assert_allclose(losses, on_one_device[0], rtol=1e-3)
    assert losses != on_one_device[0]


def test_the_loss_has_the_z_loss_of_the_config(on_one_device):
    losses, _ = run_steps(tiny_config(**{"loss.z_loss": 0.1}), 1, jax.devices()[:1])
    assert losses[0] > 1.1 * on_one_device[0][0]  # With 64 words log Z is above 3 at first.


def test_rows_of_one_segment_need_no_segment_ids():
    config = tiny_config(**{"data.mixture": "stdlib=1"})
    definition = define(ModelConfig.of(config.model))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    assert train.abstract_inputs(config, definition, mesh)[1].segment_ids is None
    state, batch = jax.jit(lambda: train.init_state(config, definition))(), random_batch()
    step = jax.jit(train.step_function(config, definition))
    with_ids = step(state, batch._replace(segment_ids=np.ones_like(batch.segment_ids)))
    without = step(state, Row(batch.tokens))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), without, with_ids)


class Recorder:
    def __init__(self):
        self.records, self.events = [], []

    def write(self, step, values):
        self.records.append((step, dict(values)))
        self.events.append(("write", step))

    def progress(self, step, values):
        self.events.append(("progress", step))

    def flush(self):
        self.events.append(("flush", None))


class Answering:
    def __init__(self, answer):
        self.answer = answer

    def run(self, params):
        return Result({"answer": Interval(self.answer, None, None)}, [])


@dataclasses.dataclass
class FakeStep:
    """A step whose loss is its number, NaN at one of them; notes when its metrics are fetched."""

    nan_at: int = -1

    def __call__(self, state, batch):
        state = state._replace(step=state.step + 1)
        step = int(state.step)
        loss = np.float32(np.nan if step == self.nan_at else step)
        return state, {"loss": loss, "grad_norm": np.float32(1), "learning_rate": np.float32(0.1)}


def loop(config, step_fn, start=0, evaluators=None, clock=None, batches=None):
    writer, saves = Recorder(), []
    state = train.TrainState(np.int32(start), {}, (), {})

    def save(step, state):
        saves.append((step, int(state.step)))
        writer.events.append(("save", step))

    def go():
        return train.train_loop(
            config, state, batches or iter(lambda: {}, None), step_fn,
            start=start, evaluators=evaluators or {}, writer=writer, save=save,
            clock=clock or Clock(), trace=Trace(pathlib.Path(), start=1, num_steps=0),
        )  # fmt: skip

    return writer, saves, go


def test_the_loop_writes_every_nth_step_once_with_evaluations_in_the_same_record():
    config = tiny_config(**{"num_steps": 10, "log.every": 3, "eval.every": 4, "checkpoint.every": 5})
    writer, saves, go = loop(config, FakeStep(), evaluators={"quiz": Answering(42.0)})
    go()
    assert [step for step, _ in writer.records] == [1, 3, 4, 6, 8, 9, 10]
    assert all(values["loss"] == step for step, values in writer.records)
    assert [step for step, values in writer.records if values.get("quiz/answer") == 42.0] == [4, 8, 10]
    assert saves == [(5, 5), (10, 10)]


def test_the_log_is_flushed_before_a_save_and_holds_the_saved_step():
    config = tiny_config(**{"num_steps": 4, "log.every": 1, "eval.every": 100, "checkpoint.every": 2})
    writer, _, go = loop(config, FakeStep())
    go()
    before = writer.events[: writer.events.index(("save", 2))]
    assert before[-1] == ("flush", None) and ("write", 2) in before


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_is_never_saved():
    config = tiny_config(**{"num_steps": 20, "checkpoint.every": 5, "eval.every": 100})
    _, saves, go = loop(config, FakeStep(nan_at=10))
    with pytest.raises(train.Diverged, match="step 10: the loss is nan"):
        go()
    assert saves == [(5, 5)]


def test_a_gradient_that_is_not_finite_stops_the_run_too():
    def step_fn(state, batch):
        state, metrics = FakeStep()(state, batch)
        return state, metrics | {"grad_norm": np.float32(np.inf)}

    _, saves, go = loop(tiny_config(num_steps=2), step_fn)
    with pytest.raises(train.Diverged, match="step 1: the loss is 1.0 and the gradient norm inf"):
        go()
    assert not saves


def test_metrics_are_fetched_after_the_next_step_was_dispatched():
    config = tiny_config(**{"num_steps": 6, "log.every": 1, "eval.every": 100, "checkpoint.every": 100})
    writer, _, _ = loop(config, FakeStep())
    step_fn, seen = FakeStep(), []

    def spying(state, batch):
        seen.append(len(writer.records))
        return step_fn(state, batch)

    writer, _, go = loop(config, spying)
    go()
    assert seen == [0, 0, 1, 2, 3, 4]  # When step n is dispatched, step n - 2 is the last one on record.


def test_a_record_tells_steps_from_start_compilation_evaluations_and_saves(monkeypatch):
    """Seconds of this loop: start 5, compilation 10, data 1/4 a step, metrics 3 a step, evaluation 7."""
    config = tiny_config(**{"num_steps": 4, "log.every": 2, "eval.every": 4, "checkpoint.every": 4})
    time = [0.0]

    def passes(seconds, result=None):
        time[0] += seconds
        return result

    class SlowQuiz:
        def run(self, params):
            passes(7.0)
            return Answering(1.0).run(params)

    def step_fn(state, batch, step_fn=FakeStep()):  # noqa: B008
        passes(10.0 if int(state.step) == 0 else 0.0)
        return step_fn(state, batch)

    clock = Clock(now=lambda: time[0])
    passes(5.0)
    monkeypatch.setattr(train.jax, "device_get", lambda metrics: passes(3.0, metrics))
    batches = iter(lambda: passes(0.25, {}), None)
    writer, _, go = loop(config, step_fn, evaluators={"quiz": SlowQuiz()}, clock=clock, batches=batches)
    go()

    names = ("step_seconds", "step_seconds_p50", "step_seconds_p90", "data_wait", "goodput")
    told = {step: [values[name] for name in names] for step, values in writer.records}
    # Step 2 is dispatched, and its data waited for, before the metrics of step 1 arrive; so step 4 waits for none.
    assert told == {
        1: pytest.approx([3.5, 3.5, 3.5, 0.5 / 3.5, 3 / 18.5]),
        2: pytest.approx([3.25, 3.25, 3.25, 0.25 / 3.25, 6 / 21.75]),
        4: pytest.approx([3.125, 3.125, 3.225, 0.25 / 6.25, 12 / 35]),
    }
    assert clock.summary() == "35.0 s: steps 12.0 s, compilation 10.0 s, evaluations 7.0 s, start 5.0 s, data 1.0 s"
