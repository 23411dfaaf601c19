"""Parameters are split into those that train and the rest, and a step changes the first alone."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meap_jax import partition, sharding, train
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from test_train import initial, on_mesh, random_batch
from tiny_runs import tiny_config

GLOBS = ("*", "head", "layers.attn.*", "*norm.scale", "layers.*")
SHAPES = define(ModelConfig.of(tiny_config().model)).shapes()


def names(tree):
    return {".".join(key.key for key in path) for path, _ in jax.tree.leaves_with_path(tree)}


@given(st.sets(st.sampled_from(GLOBS), min_size=1))
def test_the_two_trees_share_nothing_and_merge_into_the_whole(globs):
    trained, frozen = partition.split(SHAPES, ",".join(sorted(globs)))
    assert not names(trained) & names(frozen)
    assert partition.merge(trained, frozen) == SHAPES


def test_globs_go_by_the_path_of_a_parameter():
    trained, _ = partition.split(SHAPES, "head, layers.attn.?_proj")
    assert names(trained) == {"head", *(f"layers.attn.{x}_proj" for x in "qkvo")}


TRAINABLE = "head,layers.mlp.*"


def one_step(trainable, num_devices, **changes):
    """The state before and after a step of a decoder of one layer."""
    clip = {"optimizer.clip_norm": 1e9}  # By the norm of what trains.
    config = tiny_config(trainable=trainable, **{"model.num_layers": 1}, **clip, **changes)
    definition, mesh = (
        define(ModelConfig.of(config.model)),
        sharding.make_mesh(config.mesh, jax.devices()[:num_devices]),
    )
    _, state = initial(config, train.state_shardings(config, definition, mesh))
    before = jax.device_get(state)
    with jax.set_mesh(mesh):
        after, _ = train.compile_step(config, definition, mesh)(state, on_mesh(mesh, random_batch()))
    return before, jax.device_get(after)


@pytest.fixture(scope="module")
def of_the_whole():
    """Parameters after a step in which all of them train."""
    return one_step("*", 1)[1].params


@pytest.mark.parametrize("num_devices, changes", [(1, {}), (2, {"grad_accum_steps": 2, "mesh.fsdp": 2})])
def test_a_step_changes_what_trains_alone_by_the_gradient_of_the_whole(num_devices, changes, of_the_whole):
    before, after = one_step(TRAINABLE, num_devices, **changes)
    unchanged = jax.tree.map(np.array_equal, before.params, after.params)
    trees = (partition.split(tree, TRAINABLE) for tree in (unchanged, after.params, of_the_whole))
    (moved, kept), (trained, _), (expected, _) = trees
    assert not any(jax.tree.leaves(moved)) and all(jax.tree.leaves(kept))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), trained, expected)
    # Moments are kept for what trains alone.
    moments = [x.shape for x in jax.tree.leaves(after.opt_state) if x.ndim]
    assert sorted(moments) == sorted(2 * [x.shape for x in jax.tree.leaves(trained)]) and len(moments) == 8
