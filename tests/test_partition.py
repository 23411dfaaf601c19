"""Parameters are split into those that train and the rest, and a step changes the first alone."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meap_jax import partition
from meap_jax.model.config import ModelConfig
from meap_jax.model.decoder import define
from test_train import initial, run_steps
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


@pytest.mark.parametrize("changes", [{}, {"grad_accum_steps": 2}, {"mesh.fsdp": 2, "mesh.tensor": 2}], ids=str)
def test_a_step_changes_what_trains_and_nothing_else(changes):
    config = tiny_config(trainable=TRAINABLE, **changes)
    (_, before), (_, after) = (run_steps(config, num_steps, jax.devices()[:4]) for num_steps in (0, 2))
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    trained, frozen = partition.split(changed, TRAINABLE)
    assert all(jax.tree.leaves(trained)) and not any(jax.tree.leaves(frozen))


def test_moments_are_kept_for_what_trains_alone():
    _, state = initial(tiny_config(trainable=TRAINABLE))
    trained, _ = partition.split(state.params, TRAINABLE)
    moments = [x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sorted(moments) == sorted(2 * [x.shape for x in jax.tree.leaves(trained)]) and len(moments) == 8


def test_the_gradient_of_what_trains_is_that_of_the_whole():
    alone = {"optimizer.clip_norm": 1e9}  # By the norm of what trains.
    configs = tiny_config(**alone), tiny_config(trainable="head", **alone)
    (_, whole), (_, part) = (run_steps(config, 1, jax.devices()[:1]) for config in configs)
    np.testing.assert_allclose(part["head"], whole["head"], atol=1e-6)
    assert not np.array_equal(part["embedding"], whole["embedding"])
