"""Checkpoints: every flipped bit is found or changes nothing, failed saves are repeated, the right ones stay."""

import errno
import json
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from meap_jax import checkpoint as checkpoint_lib
from meap_jax import restore as restore_lib
from meap_jax.checkpoint import Checkpointer, Keep, SaveFailed
from meap_jax.errors import ConfigError
from meap_jax.restore import newest_meta, restore_params
from tiny_models import mesh_of


class State(NamedTuple):
    step: Any
    params: Any
    moments: Any


def state_at(step, spec=(), **mesh):
    """A small state whose every number depends on the step, laid out over a mesh."""
    mesh = mesh_of(**(mesh or {"data": 1}))
    place = NamedSharding(mesh, PartitionSpec(*spec))
    everywhere = NamedSharding(mesh, PartitionSpec())
    rng = np.random.default_rng(step)
    matrix, vector = rng.normal(size=(16, 8)).astype(np.float32), rng.normal(size=40).astype(np.float32)
    params = {"layers": {"w": jax.device_put(matrix, place)}, "norm": jax.device_put(vector, everywhere)}
    params["half"] = jax.device_put(matrix.astype(jnp.bfloat16), place)
    return State(jax.device_put(np.int32(step), everywhere), params, {"w": jax.device_put(-matrix, place)})


def template_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


META = {"config": {"seed": 1}, "tokenizer": "abc", "data": {"next_index": 3}, "rate": 0.1}


def saved(workdir, *steps, keep=9, losses=()):
    """Saves the states of steps, and closes."""
    checkpointer = Checkpointer(epath.Path(workdir), keep if isinstance(keep, Keep) else Keep(keep))
    for step in steps:
        checkpointer.save(step, state_at(step), META, dict(losses).get(step))
    checkpointer.close()


def steps_in(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def restored(workdir, **layout):
    checkpointer = Checkpointer(epath.Path(workdir), Keep(9))
    try:
        return checkpointer.restore(template_of(state_at(0, **layout)))
    finally:
        checkpointer.close()


def assert_is_state_of(found, step):
    assert found.step == step and found.meta["data"] == META["data"]
    for ours, theirs in zip(jax.tree.leaves(found.state), jax.tree.leaves(state_at(step)), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_steps")
    saved(folder, 1, 2)
    return folder


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Nothing waits between tries."""
    monkeypatch.setattr(restore_lib, "SECONDS_BETWEEN_READS", 0.0)
    monkeypatch.setattr(checkpoint_lib, "SECONDS_BETWEEN_TRIES", 0.0)


def test_a_state_comes_back_bit_for_bit_on_another_mesh(two_steps):
    assert_is_state_of(restored(two_steps), 2)
    assert_is_state_of(restored(two_steps, spec=("fsdp", "tensor"), fsdp=4, tensor=2), 2)


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(two_steps, tmp_path):
    """Forty bits in all files; what is restored is the newest state to the bit, or that before with a warning."""
    rng, outcomes = np.random.default_rng(0), {2: 0, 1: 0}
    names = [path.relative_to(two_steps) for path in (two_steps / "checkpoints" / "2").rglob("*") if path.is_file()]
    for i in range(40):
        workdir = tmp_path / str(i)
        shutil.copytree(two_steps, workdir)
        file = workdir / names[i % len(names)]
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)
        found = restored(workdir)
        assert_is_state_of(found, found.step)
        outcomes[found.step] += 1
    assert outcomes[1] >= 10, outcomes  # Of the others most are in files that nothing reads, such as times.


def test_an_array_of_another_checkpoint_is_found(two_steps, tmp_path, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    shutil.rmtree(workdir / "checkpoints" / "2" / "rest")
    shutil.copytree(workdir / "checkpoints" / "1" / "rest", workdir / "checkpoints" / "2" / "rest")
    assert_is_state_of(restored(workdir), 1)
    assert "checkpoints/2 is damaged (rest." in caplog.text and "is not as it was saved" in caplog.text
    assert (workdir / "damaged_checkpoints" / "2").exists()


def test_a_number_of_meta_that_was_changed_is_found(two_steps, tmp_path, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    file = workdir / "checkpoints" / "2" / "meta" / "metadata"
    file.write_text(file.read_text().replace('"next_index": 3', '"next_index": 4'))
    assert newest_meta(epath.Path(workdir))["data"] == META["data"]
    assert "meta is not as it was saved: its SHA-256 is another" in caplog.text


def test_parameters_alone_are_compared_too_in_the_dtype_in_which_they_were_saved(two_steps, tmp_path, caplog):
    shapes = template_of(state_at(0)).params
    as_half = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), shapes)
    found = restore_params(epath.Path(two_steps), as_half)
    assert found.step == 2 and {x.dtype.name for x in jax.tree.leaves(found.state)} == {"bfloat16"}
    np.testing.assert_array_equal(found.state["norm"], state_at(2).params["norm"].astype(jnp.bfloat16))

    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    shutil.rmtree(workdir / "checkpoints" / "2" / "params")
    shutil.copytree(workdir / "checkpoints" / "1" / "params", workdir / "checkpoints" / "2" / "params")
    assert restore_params(epath.Path(workdir), as_half).step == 1
    assert "params.half is not as it was saved" in caplog.text


def with_layout(workdir, layout, *, has_checksums):
    """Changes what checkpoints say of their layout, as an older version would have written it."""
    for file in (workdir / "checkpoints").glob("*/meta/metadata"):
        meta = json.loads(file.read_text()) | {"layout": layout}
        if not has_checksums:
            del meta["checksums"], meta["sha256"]
        file.write_text(json.dumps(restore_lib.sealed(meta) if has_checksums else meta))


def test_the_layout_before_which_had_no_checksums_is_read(two_steps, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    with_layout(workdir, 2, has_checksums=False)
    assert_is_state_of(restored(workdir), 2)


def test_an_unknown_layout_is_refused_by_name_and_left_alone(two_steps, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    with_layout(workdir, 7, has_checksums=True)
    with pytest.raises(ConfigError, match="has layout 7, this version reads layout 2 and 3: use the version"):
        restored(workdir)
    assert steps_in(workdir) == [1, 2]


def test_flipped_bits_of_meta_never_stop_a_run_that_has_an_older_checkpoint(two_steps, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    file = workdir / "checkpoints" / "2" / "meta" / "metadata"
    content = file.read_bytes()
    for place in range(0, 8 * len(content), 37):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        assert newest_meta(epath.Path(workdir))["step"] in (1, 2)


@pytest.mark.parametrize("error, is_damage", [
    (ValueError("Error decoding chunk"), True),
    (FileNotFoundError(2, "No such file"), True),
    (NotADirectoryError(20, "Not a directory"), True),
    (IsADirectoryError(21, "Is a directory"), True),
    (OSError(5, "Input/output error"), False),
    (OSError(24, "Too many open files"), False),
    (MemoryError(), False),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"), False),
    (ValueError("UNAVAILABLE: 503 while reading gs://bucket"), False),
])  # fmt: skip
def test_only_what_shows_damage_counts_as_damage(two_steps, tmp_path, monkeypatch, error, is_damage):
    """A disk or network that fails for a while must not cost the newest checkpoint."""
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    original = restore_lib._read_step

    def read(manager, step, *arguments):
        if step == 2:
            raise error
        return original(manager, step, *arguments)

    monkeypatch.setattr(restore_lib, "_read_step", read)
    if is_damage:
        assert restored(workdir).step == 1
        return
    with pytest.raises(ConfigError, match="checkpoints/2 can't be read now .* start again when that is over"):
        restored(workdir)
    assert steps_in(workdir) == [1, 2]


# -------------------------------------------------------------------------------------------------------- which stay


@given(st.permutations(range(1, 12)), st.integers(1, 4), st.integers(0, 20), st.integers(0, 3))
def test_the_newest_the_best_and_every_nth_stay_and_no_others(order, newest, every, best):
    steps, losses = order[:9], {step: float(i) for i, step in enumerate(order[2:9])}
    chosen = Keep(newest, every, best).chosen(steps, losses)
    by_loss = sorted(losses, key=losses.get)
    wanted = {*sorted(steps)[-newest:], *by_loss[:best], *(step for step in steps if every and step % every == 0)}
    assert chosen == wanted


def test_the_best_by_validation_loss_stays_also_after_a_restart(tmp_path):
    keep = Keep(1, every=0, best=1)
    saved(tmp_path, 1, 2, 3, keep=keep, losses={1: 3.0, 2: 1.0, 3: 2.0})
    assert steps_in(tmp_path) == [2, 3]
    saved(tmp_path, 4, 5, keep=keep, losses={4: 1.5, 5: 1.2})
    assert steps_in(tmp_path) == [2, 5]
    assert newest_meta(epath.Path(tmp_path))["validation_loss"] == 1.2
    saved(tmp_path, 6, 7, keep=keep, losses={6: 0.5, 7: 0.9})
    assert steps_in(tmp_path) == [6, 7]


def test_every_nth_stays(tmp_path):
    saved(tmp_path, 2, 4, 6, 8, 10, 11, keep=Keep(2, every=4))
    assert steps_in(tmp_path) == [4, 8, 10, 11]


# -------------------------------------------------------------------------------------------------- saves that fail


def failing(monkeypatch, times):
    """Makes so many writes of arrays fail in the background, as on a full disk; returns a list of their errors."""
    import orbax.checkpoint as ocp

    handler = ocp.handlers.StandardCheckpointHandler if hasattr(ocp, "handlers") else ocp.StandardCheckpointHandler
    original, errors = handler.finalize, []

    def finalize(self, *args, **kwargs):
        if len(errors) < times:
            errors.append(OSError(errno.ENOSPC, "No space left on device"))
            raise errors[-1]
        return original(self, *args, **kwargs)

    monkeypatch.setattr(handler, "finalize", finalize)
    return errors


def test_a_save_that_failed_in_the_background_is_noticed_forgotten_and_repeated(tmp_path, monkeypatch, caplog):
    """Orbax keeps such a step among those that it believes to be saved; the one before must not be deleted for it."""
    checkpointer = Checkpointer(epath.Path(tmp_path), Keep(1))
    checkpointer.save(1, state_at(1), META)
    assert checkpointer.finish()
    errors = failing(monkeypatch, 1)
    checkpointer.save(2, state_at(2), META)
    while checkpointer._manager.is_saving_in_progress():
        pass
    assert checkpointer.is_to_save_again() and len(errors) == 1
    assert checkpointer._manager.latest_step() == 1 and steps_in(tmp_path) == [1]
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))
    assert "the checkpoint of step 2 was not saved (" in caplog.text and "No space left on device" in caplog.text
    checkpointer.save(2, state_at(2), META)
    assert checkpointer.finish() and not checkpointer.is_to_save_again()
    checkpointer.close()
    assert steps_in(tmp_path) == [2]
    assert_is_state_of(restored(tmp_path), 2)


def test_after_three_failures_the_run_is_told_what_to_do(tmp_path, monkeypatch):
    checkpointer = Checkpointer(epath.Path(tmp_path), Keep(1))
    checkpointer.save(1, state_at(1), META)
    assert checkpointer.finish()
    failing(monkeypatch, 3)
    for step in (2, 3, 4):
        checkpointer.save(step, state_at(step), META)
    with pytest.raises(SaveFailed, match=r"of step 4 can't be saved in .*after 3 tries.*goes on from step 1\."):
        checkpointer.finish()
    checkpointer.close()
    assert steps_in(tmp_path) == [1]


# ------------------------------------------------------------------------------------------------------------ buckets


def test_a_checkpoint_in_a_bucket_without_its_mark_is_neither_trusted_nor_deleted(bucket, caplog):
    for step, has_mark in ((1, True), (2, False), (3, False)):
        (bucket / "checkpoints" / str(step)).mkdir(parents=True)
        (bucket / "checkpoints" / str(step) / "data").write_text(f"of {step}")
        if has_mark:
            (bucket / "checkpoints" / str(step) / checkpoint_lib.COMMIT_MARK).write_text("")
    checkpoint_lib._clean_up(bucket / "checkpoints")
    assert [path.name for path in (bucket / "checkpoints").iterdir()] == ["1"]
    assert [(bucket / "unmarked_checkpoints" / step / "data").read_text() for step in "23"] == ["of 2", "of 3"]
    assert "checkpoints/2 has no commit_success.txt" in caplog.text


def test_on_a_disk_what_a_killed_save_left_is_deleted_and_nothing_else(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    Checkpointer(epath.Path(tmp_path), Keep(1)).close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "notes.txt"]
