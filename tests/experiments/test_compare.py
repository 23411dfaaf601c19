"""The comparison from its command to its page, at tiny size."""

import json
import shutil

import jax
import numpy as np
import pytest

import tiny_runs
from experiments import compare
from experiments.compare import steps_of_a_turn
from meap_jax import cli, main
from meap_jax.errors import ConfigError, Diverged
from meap_jax.models import open_model

FIELDS = dict(num_steps=4, eval__facts__counts="2,3", eval__facts__documents=2)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of two seeds that is done."""
    folder = tmp_path_factory.mktemp("compared")
    # XLA takes a loop of one step apart, and the bits of what was in it may then differ from those of the step alone.
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(compare, "steps_of_a_turn", lambda num_steps: 2)
    compare.command(["compare", "--seeds=2", *tiny_runs.flags(folder, **FIELDS)])
    yield folder
    monkeypatch.undo()


def test_all_arms_of_all_seeds_are_in_the_results(compared):
    results = json.loads((compared / "results.json").read_text())
    assert results["seeds"] == [0, 1]
    for file in ("learning.png", "accuracy.png"):
        assert (compared / file).read_bytes().startswith(b"\x89PNG")
    page = (compared / "report.md").read_text()
    for arm in compare.ARMS:
        assert arm.label in page
        for seed in (0, 1):
            assert (compared / f"{arm.name}-seed{seed}" / "config.json").exists()


def test_a_second_call_trains_nothing_and_comes_to_the_same(compared, monkeypatch, capsys):
    before = json.loads((compared / "results.json").read_text())
    monkeypatch.setattr(compare.population, "_settle", lambda *_: pytest.fail("it is done"))
    compare.command(["compare", "--seeds=2", *tiny_runs.flags(compared, **FIELDS)])
    after = json.loads((compared / "results.json").read_text())
    assert before.pop("setting") != after.pop("setting")  # The first one says how long it took.
    assert before == after and f"report: {compared / 'report.md'}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ntp", "meap_ramped"])
def test_a_folder_is_that_of_the_training_command_which_goes_on_from_it(compared, tmp_path, name, monkeypatch):
    arm = next(arm for arm in compare.ARMS if arm.name == name)
    fields = {key.replace(".", "__"): value for key, value in arm.changes.items()} | FIELDS
    fields |= dict(seed=1, data__prepared=compared / "data", checkpoint__every=2)
    # In this process: with another number of CPU devices XLA splits sums otherwise, and their last bits differ.
    one_device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one_device)

    def train(folder, **changes):
        return main.train(*cli.parse_config(["main", *tiny_runs.flags(folder, **fields | changes)]))

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    shutil.copytree(compared / f"{name}-seed1", ours)
    whole = train(theirs)
    jax.tree.map(np.testing.assert_array_equal, open_model(ours).params, whole.params)
    # Both go on to the last step of a longer run.
    states = [train(folder, num_steps=6) for folder in (ours, theirs)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert states[0].step == 6


def test_a_run_that_diverges_stops_the_comparison_and_no_page_is_written(tmp_path):
    words = tiny_runs.flags(tmp_path, optimizer__learning_rate=1e30)
    with pytest.raises(Diverged, match=r"the loss of \w+ with seed 0, or its gradient, is not finite by step"):
        compare.command(["compare", "--seeds=2", *words])
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize("value", ["1", "0", "-1", "two", ""])
def test_a_comparison_needs_two_seeds(value):
    with pytest.raises(ConfigError, match="--seeds is .*, but must be a number from 2 on"):
        compare.command(["compare", f"--seeds={value}"])


def test_a_turn_is_a_sixtieth_of_the_run_or_less():
    assert [steps_of_a_turn(n) for n in (1, 8, 60, 120, 1_500, 2_000, 8_000, 61)] == [
        1,
        1,
        1,
        2,
        25,
        25,
        125,
        1,
    ]


def test_what_is_asked_has_the_facts_of_training_and_of_the_test(compared):
    config, workdir = cli.parse_config(["compare", *tiny_runs.flags(compared, **FIELDS)])
    asked = compare.probes(compare.open_run(config, workdir))
    counts = {name: set(of_set.answers["num_facts"].tolist()) for name, of_set in asked.items()}
    assert counts == {"trained": {2, 3}, "longer": {3}}
