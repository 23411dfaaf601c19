"""A population in one program: each member as if alone, one compile for all, and the command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_runs
from experiments import mask_ratio
from meap_jax import cli, sharding, train
from meap_jax.config import ConfigError, mixture
from meap_jax.data.pipeline import TrainBatches
from meap_jax.run import Run, open_run

RATIOS = (0.0, 0.15, 0.5)
NUM_SEEDS = 2
NUM_STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    workdir = tmp_path_factory.mktemp("population")
    flags = tiny_runs.flags(workdir, num_steps=NUM_STEPS, mesh__data=2, mesh__fsdp=-1)
    config, workdir = cli.parse_config(["mask_ratio", *flags])
    return open_run(config, workdir)


def train_population(run, ratios, monkeypatch):
    """The trained population, and how often `train_step` was traced for it."""
    traces = []

    def counted(config, definition):
        step = train.step_function(config, definition)

        def counting(state, batch, ratio):
            traces.append(ratio)
            return step(state, batch, ratio)

        return counting

    monkeypatch.setattr(mask_ratio, "step_function", counted)
    monkeypatch.setattr(mask_ratio, "MOST_STEPS_A_CALL", 2)  # Two calls of two steps.
    population = mask_ratio.train(run, ratios, NUM_SEEDS)
    return population, len(traces)


def train_alone(run, seed):
    """{ratio: state} of the same model by `train_step` alone, with what `meap_jax.main` gives it at this seed."""
    config = mask_ratio.seed_configs(run.config, seed + 1)[seed]
    lies = train.state_shardings(config, run.definition, run.mesh)
    start = jax.jit(lambda: train.init_state(config, run.definition), out_shardings=lies)()
    batches = TrainBatches(
        run.prepared,
        mixture(config),
        seed=seed,
        batch_size=config.global_batch_size,
        sharding=sharding.batch_sharding(run.mesh),
    )
    batches = [next(batches) for _ in range(NUM_STEPS)]
    step = train.step_function(config, run.definition)
    step = jax.jit(step, out_shardings=(lies, sharding.replicated(run.mesh)))

    def trained(ratio):
        state = start
        for batch in batches:
            state, _ = step(state, batch, jnp.float32(ratio))
        return jax.device_get(state)

    with jax.set_mesh(run.mesh):
        return {ratio: trained(ratio) for ratio in RATIOS}


def test_every_member_is_bit_equal_to_the_model_trained_alone_and_all_share_one_trace(run, monkeypatch):
    population, num_traces = train_population(run, RATIOS, monkeypatch)
    states = jax.device_get(population.state)
    alone = [train_alone(run, seed) for seed in range(NUM_SEEDS)]
    for member, (ratio, seed) in enumerate((r, s) for r in RATIOS for s in range(NUM_SEEDS)):
        jax.tree.map(lambda x, y, i=member: np.testing.assert_array_equal(x[i], y), states, alone[seed][ratio])
    kernels = jax.tree.leaves(states.params)[0]
    assert len(np.unique(kernels.reshape(len(kernels), -1), axis=0)) == len(RATIOS) * NUM_SEEDS

    assert num_traces == 1


def test_the_command_prints_a_table_and_writes_json_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = tiny_runs.flags("runs/sweep", num_steps=2)
    mask_ratio.command(["mask_ratio", "--ratios=0,.15", "--seeds=2", *flags])

    table = capsys.readouterr().out
    assert "| 0.15 | " in table and " ± " in table and "[" in table
    results = json.loads((tmp_path / "runs/sweep/mask_ratio.json").read_text())
    assert set(results["metrics"]) == {"validation_retrieval/loss", "validation_retrieval_answers/accuracy"}
    for rows in results["metrics"].values():
        assert [row["ratio"] for row in rows] == [0, 0.15]
        assert all(len(row["values"]) == 2 and np.isfinite(row["values"]).all() for row in rows)
    assert (tmp_path / "runs/sweep/mask_ratio.png").read_bytes().startswith(b"\x89PNG")


def test_differences_are_paired_by_seed():
    rows = mask_ratio.summarize(np.array([1.0, 2.0, 3.0, 1.1, 2.2, 3.3]), (0, 0.5))
    assert [row["mean"] for row in rows] == pytest.approx([2.0, 2.2])
    assert rows[1]["sd"] == pytest.approx(1.1)
    # t(0.975, 2 degrees of freedom) = 4.30265; the differences 0.1, 0.2, 0.3 have sd 0.1.
    half = 4.30265 * 0.1 / np.sqrt(3)
    expected = {"estimate": 0.2, "low": 0.2 - half, "high": 0.2 + half}
    assert rows[1]["difference"] == pytest.approx(expected, abs=1e-5)


def test_a_loss_that_is_not_finite_stops_the_sweep_and_names_the_member(run, monkeypatch):
    def diverging(state, batch, ratio):
        loss = jnp.where((ratio > 0.4) & (state.step >= 1), jnp.nan, 1.0)
        return state._replace(step=state.step + 1), {"loss": loss}

    monkeypatch.setattr(mask_ratio, "step_function", lambda *_: diverging)
    with pytest.raises(train.Diverged, match="ratio 0.5 with seed 0 is not finite by step 4"):
        mask_ratio.train(run, RATIOS, NUM_SEEDS)


@pytest.mark.parametrize(
    "flag", ["--ratios=.1,.2", "--ratios=0,1.5", "--ratios=0,nan", "--ratios=0,0", "--ratios=x", "--ratios"]
)
def test_bad_ratios_are_named(flag):
    with pytest.raises(ConfigError, match="--ratios is"):
        mask_ratio.command(["mask_ratio", flag])


@pytest.mark.parametrize("value", ["1", "0", "-1", "two"])
def test_bad_seeds_are_named(value):
    with pytest.raises(ConfigError, match="--seeds is"):
        mask_ratio.command(["mask_ratio", f"--seeds={value}"])
