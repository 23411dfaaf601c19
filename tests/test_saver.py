"""Real runs that go back after a spike, and go on from any of their checkpoints as if nothing had happened."""

import json
import shutil

import pytest

from meap_jax import main
from tiny_runs import flags, losses, records

# Noise is enough for a spike here: a loss two median absolute deviations above the median of the last ones.
SPIKES = dict(
    num_steps=60, checkpoint__every=5, checkpoint__keep=99, eval__tasks="", numerics__spike=2.0,
    numerics__max_rewinds=2, numerics__spike_window=20, optimizer__learning_rate=1e-5,
)  # fmt: skip


def train(workdir, **overrides):
    main.command(["main", *flags(workdir, **overrides)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared") / "data"


@pytest.fixture(scope="module")
def with_spikes(data, tmp_path_factory):
    """A finished run that went back twice."""
    workdir = tmp_path_factory.mktemp("spikes") / "run"
    train(workdir, data__prepared=data, **SPIKES)
    return workdir


def metas(workdir):
    """{step: what its checkpoint says}."""
    files = (workdir / "checkpoints").glob("*/meta/metadata")
    return {int(file.parent.parent.name): json.loads(file.read_text()) for file in files}


def test_a_run_that_went_back_has_each_step_once_and_left_data_out(with_spikes):
    assert list(losses(with_spikes)) == list(range(1, 61))
    found = metas(with_spikes)
    assert found[60]["monitor"]["rewinds"] == 2
    ahead = [found[step]["data"]["next_index"] - step for step in sorted(found)]
    assert ahead == sorted(ahead) and ahead[0] == 0 and ahead[-1] >= 2


def test_it_goes_on_from_any_checkpoint_as_if_nothing_had_happened(with_spikes, data, tmp_path):
    found = metas(with_spikes)
    before = max(step for step, meta in found.items() if meta["monitor"]["rewinds"] == 0)
    after = min(step for step, meta in found.items() if meta["monitor"]["rewinds"] >= 1)
    for start in (before, after):
        workdir = tmp_path / str(start)
        shutil.copytree(with_spikes, workdir)
        for step in found:
            if step > start:
                shutil.rmtree(workdir / "checkpoints" / str(step))
        train(workdir, data__prepared=data, **SPIKES)
        assert losses(workdir) == losses(with_spikes)


def test_the_best_checkpoint_stays_and_says_how_good_it_is(data, tmp_path):
    keep = dict(checkpoint__keep=1, checkpoint__keep_best=1, checkpoint__every=2, eval__every=2)
    train(tmp_path, data__prepared=data, **keep, optimizer__learning_rate=0.3)
    best = {r["step"]: r["validation_retrieval/loss"] for r in records(tmp_path) if "validation_retrieval/loss" in r}
    steps = {min(best, key=best.get), 8}
    found = metas(tmp_path)
    assert set(found) == steps and all(meta["validation_loss"] == best[step] for step, meta in found.items())


def test_devices_that_agree_and_steps_that_repeat_are_let_through(data, tmp_path):
    checks = dict(numerics__check_replicas=1, debug__check_determinism=True)
    train(tmp_path / "checked", data__prepared=data, num_steps=3, eval__tasks="", **checks)
    train(tmp_path / "plain", data__prepared=data, num_steps=3, eval__tasks="")
    assert losses(tmp_path / "checked") == losses(tmp_path / "plain")
