"""The members of a population: which there are, who takes the next turn, who starts from whom, and their files."""

import dataclasses
import functools
import json
import logging
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from experiments.arms import Arm, config_of, family, fork_step, program
from meap_jax.errors import ConfigError
from meap_jax.model.decoder import Params
from meap_jax.objective import Objective
from meap_jax.run import Run
from meap_jax.train import TrainState

# What zipfile, zlib and numpy raise for a flipped bit; the last two of them for "compression" and "encryption".
_DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, NotImplementedError, RuntimeError)

_log = logging.getLogger("meap_jax.experiments.members")


@dataclasses.dataclass(eq=False)
class Member:
    """One model in training."""

    arm: Arm
    seed: int
    config: ml_collections.ConfigDict
    state: TrainState | None = None  # Of host arrays; None until it starts.
    step: int = 0
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # One for each turn.
    kept: dict[int, Params] = dataclasses.field(default_factory=dict)  # Parameters at some steps.
    forks: list["Member"] = dataclasses.field(default_factory=list)  # That start from this one.
    is_asked_for: bool = True  # False: it is trained for its forks alone.

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm.name}-seed{self.seed}"

    @functools.cached_property
    def program(self) -> str:
        """Equal for members that one program trains."""
        return program(self.config)

    @functools.cached_property
    def ratios(self) -> np.ndarray:
        """The mask ratio of each step, [num_steps] float32."""
        steps = np.arange(self.config.num_steps, dtype=np.int32)
        ratio_at = Objective.of(self.config).ratio_at
        return np.asarray(jax.jit(jax.vmap(lambda step: jnp.asarray(ratio_at(step), jnp.float32)))(steps))

    @property
    def trained(self) -> TrainState:
        """Its state, where it has one."""
        assert self.state is not None
        return self.state

    def last_step(self, every: int) -> int:
        """Of its training, in turns of `every` steps."""
        if self.is_asked_for:
            return self.config.num_steps
        return max(fork_step(fork.config, every) for fork in self.forks)


def make_members(run: Run, arms: Sequence[Arm], seeds: Sequence[int], every: int) -> list[Member]:
    """All members, NTP ones before those that start from them; an NTP member that no arm asks for is added."""
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ValueError(f"arms must have different names, got {', '.join(names)}")
    asked = [Member(arm, seed, config_of(run.config, arm, seed)) for seed in seeds for arm in arms]
    trunks: dict[tuple[str, int], Member] = {}
    for member in asked:
        if fork_step(member.config, every) == member.config.num_steps:
            trunks.setdefault((family(member.config), member.seed), member)
    for member in asked:
        key = family(member.config), member.seed
        if 0 < fork_step(member.config, every) < member.config.num_steps:
            if key not in trunks:
                arm = Arm(f"ntp_of_{member.arm.name}", "", dict(member.arm.changes) | {"objective.name": "ntp"})
                trunks[key] = Member(arm, member.seed, config_of(run.config, arm, member.seed), is_asked_for=False)
            trunks[key].forks.append(member)
    hidden = [trunk for trunk in trunks.values() if not trunk.is_asked_for]
    return [*hidden, *asked]


def steps_to_do(members: Sequence[Member], every: int) -> int:
    """Steps that are left of all members together."""
    todo = 0
    for member in members:
        step = member.step if member.state is not None else fork_step(member.config, every)
        todo += member.last_step(every) - step
    return todo


def next_turn(members: Sequence[Member], num_devices: int, every: int, running: Sequence[Member] = ()) -> list[Member]:
    """Those that have come least far, of one program, so that all devices stay busy to the end.

    Members that are `running` count as if their turn were over.
    """
    steps = {id(m): m.step + every * (m in running) for m in members}
    ready = [m for m in members if m.state is not None and steps[id(m)] < m.last_step(every)]
    ready.sort(key=lambda m: (steps[id(m)], -len(m.forks)))
    return [m for m in ready if m.program == ready[0].program][:num_devices]


def fork(member: Member, every: int) -> None:
    """Gives the members that start from this one its state, if it has come to the step where they do."""
    for other in member.forks:
        if other.state is None and fork_step(other.config, every) == member.step:
            other.state, other.step = member.state, member.step
            other.records, other.kept = list(member.records), dict(member.kept)


def save(folder: epath.Path, members: Sequence[Member]) -> None:
    """Writes the states of members, each into a file that is there whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    # What others start from comes last: it has passed the step where they do only if they are on disk.
    for member in sorted(members, key=lambda m: len(m.forks)):
        if member.state is None:
            continue
        file, whole = folder / f"{member.name}.part", folder / f"{member.name}.npz"
        with file.open("wb") as out:
            arrays = {str(i): x for i, x in enumerate(jax.tree.leaves(member.state))}
            about = json.dumps({"config": member.config.to_dict(), "records": member.records})
            np.savez(out, about=np.array(about), **arrays)
        file.replace(whole)


def restore(folder: epath.Path, member: Member, template: TrainState) -> bool:
    """Reads what `save` wrote of a member; whether there is anything.

    Raises:
      ConfigError: it is of another config.
    """
    file = folder / f"{member.name}.npz"
    if not file.exists():
        return False
    leaves, tree = jax.tree.flatten(template)
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as saved:
            about = json.loads(str(saved["about"]))
            # numpy's files know no bfloat16: it comes back as two bytes that mean nothing.
            own = [saved[str(i)].view(leaf.dtype) for i, leaf in enumerate(leaves)]
    except _DAMAGES as error:  # Each part has a checksum.
        aside = file.with_name(file.name + ".damaged")
        file.replace(aside)
        _log.warning("%s is damaged (%s): it was moved to %s, and is trained again", file, error, aside.name)
        return False
    if about["config"] != json.loads(json.dumps(member.config.to_dict())):
        raise ConfigError(f"{file} is of another config: use another --workdir, or the fields that it was made with.")
    member.state = jax.tree.unflatten(tree, own)
    member.records = about["records"]
    member.step = int(member.state.step)
    return True
