"""Arms: which configs they give, and what they have in common with NTP and with each other."""

import pytest

from experiments.arms import Arm, config_of, family, filler_of, fork_step, program
from meap_jax.errors import ConfigError
from tiny_runs import tiny_config

RAMP = {"objective.ramp_from": 0.0, "objective.ramp_begin": 0.5}


def made(seed=0, **changes):
    c = tiny_config(num_steps=100)
    return config_of(c, Arm("arm", "", {name.replace("__", "."): value for name, value in changes.items()}), seed)


def test_a_config_is_the_experiments_with_what_the_arm_sets():
    c = made(seed=7, objective__ramp_from=None, objective__mask_ratio=0.3)
    assert (c.seed, c.objective.mask_ratio, c.objective.ramp_from, c.num_steps) == (7, 0.3, None, 100)
    with pytest.raises(ConfigError, match=r"objective.mask_ratio is 1.5, but must be in \[0, 1\]"):
        made(objective__mask_ratio=1.5)


@pytest.mark.parametrize(
    "changes, step",
    [
        ({"objective.name": "ntp"}, 100),
        ({"objective.name": "ntp", **RAMP}, 100),
        ({"objective.mask_ratio": 0.0}, 100),
        ({"objective.mask_ratio": 0.0, **RAMP}, 100),
        ({}, 0),
        (RAMP, 50),
        (RAMP | {"objective.ramp_begin": 0.59}, 50),  # A turn that the ramp begins in is the arm's own.
        (RAMP | {"objective.ramp_begin": 0.6}, 60),
        (RAMP | {"objective.ramp_from": 0.1}, 0),
        ({"objective.mask_ratio": 0.0, **RAMP, "objective.ramp_from": 0.1}, 0),
    ],
)
def test_a_run_is_ntps_until_its_ratio_leaves_0(changes, step):
    assert fork_step(config_of(tiny_config(num_steps=100), Arm("arm", "", changes), 0), 10) == step


def test_one_family_shares_all_but_the_objective():
    assert family(made()) == family(made(objective__name="ntp")) == family(made(objective__mask_ratio=0.5))
    assert family(made()) != family(made(optimizer__weight_decay=0.5)) and family(made()) != family(made(seed=1))


def test_one_program_trains_what_differs_in_ratios_tokens_in_gaps_and_seeds_alone():
    same = [
        made(objective__name="ntp"),
        made(objective__name="random_tokens"),
        made(objective__mask_ratio=0.5),
        made(9),
    ]
    assert {
        program(made()),
        *map(program, same),
        program(made(**{k.replace(".", "__"): v for k, v in RAMP.items()})),
    } == {program(made())}
    others = [made(objective__name="token_dropout"), made(objective__strategy="span"), made(optimizer__b1=0.8)]
    assert len({program(made()), *map(program, others)}) == 4
    names = ("ntp", "meap", "random_tokens", "token_dropout")
    assert [filler_of(made(objective__name=name)) for name in names] == [0, 0, 1, None]
