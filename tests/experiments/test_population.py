"""A population that takes turns on the devices: each member as if alone, one trace for all, no communication."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_runs
from experiments import members as members_lib
from experiments import population
from experiments.arms import Arm, config_of, fork_step, program
from meap_jax import cli, errors, sharding, train
from meap_jax.config import mixture
from meap_jax.data.pipeline import TrainBatches
from meap_jax.errors import ConfigError
from meap_jax.evals import Setting
from meap_jax.evals.facts import Facts, Kind, make_set
from meap_jax.run import Run, open_run
from tiny_models import mesh_of

NUM_STEPS, EVERY = 8, 2
SEEDS = (0, 1)
NTP = Arm("ntp", "", {"objective.name": "ntp"})
MEAP = Arm("meap", "", {"objective.name": "meap", "objective.mask_ratio": 0.3})
RAMP = {"objective.ramp_from": 0.0, "objective.ramp_begin": 0.5, "objective.ramp_end": 0.75}
RAMPED = Arm("ramped", "", {**MEAP.changes, **RAMP})
RANDOM = Arm("random", "", {**RAMPED.changes, "objective.name": "random_tokens"})
DECAYED = Arm("decayed", "", {**RAMPED.changes, "optimizer.weight_decay": 0.5})
FORGETFUL = Arm("forgetful", "", {**RAMPED.changes, "objective.name": "fcm"})
ARMS = (RAMPED, NTP, MEAP, RANDOM)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    flags = tiny_runs.flags(tmp_path_factory.mktemp("population"), num_steps=NUM_STEPS)
    config, workdir = cli.parse_config(["population", *flags])
    config = config_of(config, Arm("", "", {}), 0)
    return open_run(config, workdir, population.evaluation_mesh(config, jax.devices()))


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """One compilation for all tests that train by the same program."""
    real, known = population.compile_turn, {}

    def compile_turn(config, definition, mesh):
        # By the step function too, which tests replace.
        key = (program(config), mesh.size, population.step_function)
        return known.setdefault(key, real(config, definition, mesh))

    population.compile_turn = compile_turn
    yield
    population.compile_turn = real


@pytest.fixture(scope="module")
def alone(run):
    """(arm, seed) -> the model trained by itself on one device, with the step and batches of `meap_jax.main`."""
    mesh = mesh_of()

    @functools.cache
    def step_of(name: str):
        arm = next(arm for arm in (*ARMS, DECAYED, FORGETFUL) if arm.name == name)
        return train.compile_step(config_of(run.config, arm, 0), run.definition, mesh)

    @functools.cache
    def trained(name: str, seed: int) -> train.TrainState:
        config = config_of(run.config, Arm("", "", {}), seed)
        shardings = train.state_shardings(config, run.definition, mesh)
        with jax.set_mesh(mesh):
            state = jax.jit(lambda: train.init_state(config, run.definition), out_shardings=shardings)()
            setting = dict(batch_size=config.global_batch_size, sharding=sharding.batch_sharding(mesh))
            batches = TrainBatches(run.prepared, mixture(config), seed=seed, **setting)
            for _ in range(NUM_STEPS):
                state, _ = step_of(name)(state, next(batches))
        return jax.device_get(state)

    return trained


def use_devices(monkeypatch, num):
    """Lets the population have `num` of the devices."""
    real = population.population_mesh
    monkeypatch.setattr(population, "population_mesh", lambda members, devices: real(members, devices[:num]))


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("num_devices", [3, 8])
def test_every_member_is_bit_equal_to_the_model_trained_alone_and_all_share_one_trace(
    run, alone, num_devices, monkeypatch
):
    step = mock.Mock(side_effect=train.step_function(config_of(run.config, MEAP, 0), run.definition))
    monkeypatch.setattr(population, "step_function", lambda *_: step)
    use_devices(monkeypatch, num_devices)
    members = population.train(run, ARMS, SEEDS, every=EVERY)
    assert [(m.arm, m.seed) for m in members] == [(arm, seed) for seed in SEEDS for arm in ARMS]
    for member in members:
        assert_equal(member.trained, alone(member.arm.name, member.seed))
        assert [record["step"] for record in member.records] == [2, 4, 6, 8]
        shares = [record["mask_fraction"] for record in member.records]
        assert [share > 0 for share in shares] == [member.arm is MEAP] * 2 + [member.arm is not NTP] * 2
    first = [np.concatenate([x.ravel() for x in jax.tree.leaves(m.trained.params)]) for m in members]
    assert len(np.unique(first, axis=0)) == len(members)
    assert step.call_count == 1


def test_what_begins_as_ntp_is_trained_from_where_it_leaves_it(run, monkeypatch):
    dispatched = []
    real = population._Program.dispatch
    monkeypatch.setattr(
        population._Program,
        "dispatch",
        lambda self, members, asked: dispatched.extend((m.name, m.step) for m in members) or real(self, members, asked),
    )
    members = population.train(run, [NTP, RAMPED], [0], every=EVERY)
    assert sorted(dispatched) == [("ntp-seed0", s) for s in (0, 2, 4, 6)] + [("ramped-seed0", s) for s in (4, 6)]
    ntp, ramped = members
    assert ntp.records[:2] == ramped.records[:2] and ntp.records[2] != ramped.records[2]


def test_other_losses_and_optimizers_have_programs_of_their_own_and_ntp_runs_that_nobody_gets_to_see(run, alone):
    members = population.train(run, [FORGETFUL, DECAYED], [1], every=EVERY)
    assert [m.name for m in members] == ["forgetful-seed1", "decayed-seed1"]
    for member in members:
        assert_equal(member.trained, alone(member.arm.name, 1))


def test_every_device_holds_its_own_member_and_no_device_sends_anything_to_another(run, monkeypatch):
    texts = []
    real = population.compile_turn

    def compiled(*args):
        turn = real(*args)

        def call(*inputs):
            texts.append(turn.lower(*inputs).compile().as_text())
            out = turn(*inputs)
            assert all(x.sharding.shard_shape(x.shape)[0] == 1 for x in jax.tree.leaves(out))
            return out

        return call

    monkeypatch.setattr(population, "compile_turn", compiled)
    population.train(run, ARMS, [0], every=NUM_STEPS // 2)
    assert "num_partitions=4" in texts[0]
    collectives = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
    assert not re.findall(rf"({collectives})[-a-z]*\(", texts[0])


@pytest.mark.parametrize("num_devices, turns", [(1, 24), (2, 12), (3, 8), (4, 6), (8, 4)])
def test_no_device_waits_before_the_end(run, num_devices, turns):
    """2 seeds of NTP (4 turns), MEAP (4) and two ramped arms (2 each): 24 turns of one member."""
    members = members_lib.make_members(run, ARMS, SEEDS, EVERY)
    for member in members:
        if not 0 < fork_step(member.config, EVERY) < NUM_STEPS:
            member.state = train.TrainState(None, None, None, None)
    taken = 0
    while chosen := members_lib.next_turn(members, num_devices, EVERY):
        taken += 1
        for member in chosen:
            member.step += EVERY
            members_lib.fork(member, EVERY)
    assert taken == turns and all(m.step == NUM_STEPS for m in members)


def test_an_interrupted_population_goes_on_bit_for_bit(run, tmp_path, monkeypatch):
    whole = population.train(run, ARMS, SEEDS, every=EVERY)
    folder = tmp_path / "states"
    monkeypatch.setattr(population, "SECONDS_BETWEEN_SAVES", 0.0)
    real = population._settle
    for most in (1, 1, 1):  # Turns until it is killed again; the first time before the ramps begin.
        left = iter(range(most))

        def settle(*args, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            real(*args)

        monkeypatch.setattr(population, "_settle", settle)
        with pytest.raises(KeyboardInterrupt):
            population.train(run, ARMS, SEEDS, every=EVERY, folder=folder)
    monkeypatch.setattr(population, "_settle", real)
    resumed = population.train(run, ARMS, SEEDS, every=EVERY, folder=folder)
    for a, b in zip(whole, resumed, strict=True):
        assert_equal(a.trained, b.trained)
        assert a.records == b.records and a.name == b.name

    monkeypatch.setattr(population, "_settle", lambda *_: pytest.fail("it is done"))
    population.train(run, ARMS, SEEDS, every=EVERY, folder=folder)
    with pytest.raises(ConfigError, match=r"ntp-seed0.npz is of another config"):
        changed = config_of(run.config, Arm("", "", {"optimizer.learning_rate": 1e-4}), 0)
        population.train(run._replace(config=changed), [NTP], SEEDS, every=EVERY, folder=folder)


def test_a_population_starts_where_init_from_says(run, tmp_path, monkeypatch):
    shapes = run.definition.shapes()
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), shapes)
    monkeypatch.setattr(population, "imported_params", lambda run: (params, {}))
    config = config_of(run.config, Arm("", "", {"init_from": str(tmp_path)}), 0)
    found = []
    monkeypatch.setattr(population, "next_turn", lambda members, *_: found.extend(members))
    population.train(run._replace(config=config), [NTP, MEAP], SEEDS, every=EVERY)
    for member in found:
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.full_like(x, 0.5)), member.trained.params)
    keys = [np.asarray(member.trained.keys["mask"]) for member in found]
    assert (keys[0] == keys[1]).all() and (keys[0] != keys[2]).any()


def test_members_are_asked_what_the_evaluator_asks(run):
    config = config_of(run.config, Arm("", "", {"eval.facts.counts": "2,3", "eval.facts.documents": 4}), 0)
    kinds = [Kind(count, fillers, 4) for count in (2, 3) for fillers in (0, 1)]
    asked = {"facts": make_set(run.prepared.tokenizer, kinds, 16, 16, 0)}
    [member] = population.train(run, [NTP], [0], every=4, questions=asked)
    evaluators = {"facts": Facts(Setting.of(run._replace(config=config), "test"))}
    [result] = population.evaluate(run, [member], evaluators)
    right = [example["correct"] for example in result.examples["facts"]]
    assert member.records[-1]["facts/accuracy"] == pytest.approx(np.mean(right), abs=1e-12)
    assert len(right) == 2 * 4 * (2 + 3)


@pytest.mark.parametrize("num_devices", [3, 8])
def test_a_loss_that_is_not_finite_stops_the_population_and_names_the_member(run, num_devices, monkeypatch):
    def diverging(state, batch, ratio, filler):
        loss = jnp.where((ratio > 0.2) & (state.step >= 5), jnp.nan, 1.0)
        return state._replace(step=state.step + 1), {"loss": loss, "mask_fraction": ratio, "grad_norm": loss}

    use_devices(monkeypatch, num_devices)
    monkeypatch.setattr(population, "step_function", lambda *_: diverging)
    with pytest.raises(errors.Diverged, match="the loss of meap with seed 0, or its gradient, is not finite by step 6"):
        population.train(run, [NTP, MEAP], SEEDS, every=EVERY)


def test_turns_must_divide_the_run(run):
    with pytest.raises(ConfigError, match="num_steps is 8, but must be a multiple of the 3 steps"):
        population.train(run, [NTP], [0], every=3)


def test_an_arm_that_is_new_begins_where_it_would_have_begun(run, alone, tmp_path):
    population.train(run, [NTP], [0], every=EVERY, folder=tmp_path)
    ntp, ramped = population.train(run, [NTP, RAMPED], [0], every=EVERY, folder=tmp_path)
    assert_equal(ramped.trained, alone("ramped", 0))
    assert_equal(ntp.trained, alone("ntp", 0))
    assert [record["step"] for record in ntp.records] == [record["step"] for record in ramped.records] == [2, 4, 6, 8]


def test_states_in_bfloat16_come_back_as_they_were(run, tmp_path):
    state = jax.device_get(train.init_state(run.config, run.definition))
    state = state._replace(params=jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), state.params))
    config = config_of(run.config, NTP, 0)
    members_lib.save(tmp_path, [members_lib.Member(NTP, 0, config, state)])
    member = members_lib.Member(NTP, 0, config)
    assert members_lib.restore(tmp_path, member, state)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), member.state, state)
    assert not list(tmp_path.glob("*.part"))


def test_arms_have_names_of_their_own(run):
    with pytest.raises(ValueError, match="arms must have different names, got ntp, ntp"):
        population.train(run, [NTP, NTP], [0], every=EVERY)
