"""The arms of an experiment: how each changes a config, and until when it is still next-token prediction (NTP)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from meap_jax.config import check, flatten, mixture
from meap_jax.errors import ConfigError
from meap_jax.objective import FILLERS, Objective


class Arm(NamedTuple):
    """One treatment, which runs with every seed."""

    name: str  # In tables and folders: "meap_ramped".
    label: str  # On pages: "MEAP 15 %, ramped".
    changes: Mapping[str, Any]  # Fields of objective.* and optimizer.* that it sets; others are the experiment's.


def config_of(base: ml_collections.ConfigDict, arm: Arm, seed: int) -> ml_collections.ConfigDict:
    """The config that trains this arm with this seed, by itself.

    Raises:
      ConfigError: for changes that no run can have.
    """
    config = ml_collections.ConfigDict(base.to_dict())  # Without placeholders, so that a field can be None.
    config.update_from_flattened_dict(dict(arm.changes))
    config.seed = seed
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"{arm.name or 'the setting'} can't be trained: {error}") from error
    return config


def check_num_seeds(text: str) -> int:
    """Reads `--seeds`.

    Raises:
      ConfigError: it is no number from 2 on.
    """
    if not text.isdecimal() or int(text) < 2:
        raise ConfigError(f"--seeds is {text!r}, but must be a number from 2 on: one seed has no spread.")
    return int(text)


def seeds_of(config: ml_collections.ConfigDict, num: int) -> list[int]:
    """So many seeds, from the config's own on.

    Raises:
      ConfigError: there are not so many below 2^32.
    """
    if config.seed + num > 2**32:
        raise ConfigError(f"--seeds is {num}, but from seed {config.seed} on there are not so many below 2^32.")
    return [config.seed + i for i in range(num)]


def check_arms(base: ml_collections.ConfigDict, arms: Sequence[Arm]) -> None:
    """Stops what no arm could be trained or asked with, before anything is done.

    Raises:
      ConfigError: for data without facts, or changes that no run can have.
    """
    if "retrieval" not in mixture(base):
        raise ConfigError(
            f"data.mixture is {base.data.mixture!r}, but must have the source retrieval, whose facts are asked for."
        )
    for arm in arms:
        config_of(base, arm, base.seed)


def fork_step(config: ml_collections.ConfigDict, every: int) -> int:
    """Finds until which step, a multiple of `every`, a run is the NTP run of its seed; `num_steps` for NTP itself."""
    objective = Objective.of(config)
    if objective.mask_ratio == 0 and not objective.ramp_from:
        return config.num_steps
    begins = objective.ramp_begin if objective.ramp_from == 0 else 0.0
    return int(begins * config.num_steps) // every * every


def family(config: ml_collections.ConfigDict) -> str:
    """Equal for configs that differ in their objective alone: they share the NTP run of their seed."""
    return _key(config, lambda name: name.startswith("objective."))


def program(config: ml_collections.ConfigDict) -> str:
    """Equal for configs that one compiled program trains: what differs is data of the program."""
    of_data = ["objective.mask_ratio", "objective.ramp_from", "objective.ramp_begin", "objective.ramp_end"]
    if filler_of(config) is not None:
        of_data.append("objective.name")
    return _key(config, lambda name: name in of_data or name.split(".")[0] in ("seed", "seeds"))


def filler_of(config: ml_collections.ConfigDict) -> int | None:
    """The place among FILLERS of what an objective puts into gaps; None if it does something else. NTP has no gaps."""
    name = "meap" if config.objective.name == "ntp" else config.objective.name
    return FILLERS.index(name) if name in FILLERS else None


def _key(config: ml_collections.ConfigDict, leaves_out: Any) -> str:
    return json.dumps({k: v for k, v in sorted(flatten(config).items()) if not leaves_out(k)})
