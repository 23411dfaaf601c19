"""Many small models, the arms of an experiment with all seeds, trained side by side on all devices.

A member of the population is one (arm, seed), and sees what `meap_jax.main` with its config sees on one device.
Members of one seed share initial weights, the order of data and the keys of masks, so that arms are paired by seed.

Members take turns. In a turn every device trains one member for some steps and asks it some questions, by one program
that is compiled once: what arms differ in (mask ratios, and what fills the gaps) is data of it. Arms with another loss
or optimizer have a program of their own. Between turns states are on the host. An arm that begins as next-token
prediction (NTP) is no member until its ratio leaves 0: then it starts from the state of its seed's NTP member.

Each member comes out as the same model trained alone with `train_step` on one device, up to rounding. Tests, for which
XLA optimizes less, find the same bits; it promises them for no backend, since it compiles a program for several devices
by other passes than one for one. A fork of NTP whose arm NTP's own program trains has the bits of one trained whole.

Two models at a time, one on each core, take 0.72 of the time that one after the other take with both cores each
(the quickstart's model, `experiments.benchmarks.population`).
"""

import contextlib
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.arms import Arm, filler_of, fork_step
from experiments.members import Member, fork, make_members, next_turn, restore, save, steps_to_do
from meap_jax import sharding
from meap_jax.config import mixture, seed_of
from meap_jax.data.pipeline import global_sequence
from meap_jax.errors import ConfigError, Diverged, Preempted
from meap_jax.evals.facts import FactSet, hits
from meap_jax.lease import held
from meap_jax.loop import Evaluator
from meap_jax.model.decoder import Definition
from meap_jax.objective import FILLERS
from meap_jax.preemption import notices
from meap_jax.results import Interval
from meap_jax.rows import Row, stacked
from meap_jax.run import Run, make_folder, open_data
from meap_jax.start import imported_params
from meap_jax.train import TrainState, init_state, state_of_params, step_function

AXIS = "population"
SECONDS_BETWEEN_SAVES = 60.0

_log = logging.getLogger("meap_jax.experiments.population")


class Treatment(NamedTuple):
    """What a program is told of an arm."""

    ratios: np.ndarray  # [steps] float32: the mask ratio of each.
    filler: np.ndarray  # int32: its place among FILLERS.


def use_all_cores() -> None:
    """Makes each core a device where jax would take all cores for one; before anything else asks jax for devices."""
    asked: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]  # Not in jax's stubs.
    if "device_count" not in os.environ.get("XLA_FLAGS", "") and asked < 0:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def check_mesh(config: ml_collections.ConfigDict) -> None:
    """Stops a config that would split a model: the population takes all devices.

    Raises:
      ConfigError: naming the axis of the mesh.
    """
    for axis, size in config.mesh.items():
        if size not in (1, -1):
            raise ConfigError(
                f"mesh.{axis} is {size}, but must be 1 or -1: the members of a population share out the devices, and "
                "each is whole on one."
            )


# -------------------------------------------------------------------------------------------------------------- program


def population_mesh(num_members: int, devices: Sequence[jax.Device]) -> Mesh:
    """The devices, or as many as there are members, along the axis `population`."""
    return Mesh(np.array(devices[:num_members]), (AXIS,), axis_types=(AxisType.Auto,))


def compile_turn(config: ml_collections.ConfigDict, definition: Definition, mesh: Mesh) -> Callable:
    """Makes the program that trains one member on each device for some steps, and asks it questions.

    It is (states [D], treatments [D], batches [D, steps, B, T + 1], questions) -> (states, measured [D, steps], hits).
    What is measured is {"loss", "mask_fraction", "grad_norm"}. Hits are {set: [D, N, A]} for the questions {set: (rows
    [N, T + 1], at [N, A])}, which all devices have. Jitted for a mesh of D devices, which send nothing to each other.
    """
    step_fn = step_function(config, definition)

    def on_device(
        state: TrainState, treatment: Treatment, batches: Row, questions: Mapping[str, tuple[Row, jax.Array]]
    ) -> tuple[TrainState, dict[str, jax.Array], dict[str, jax.Array]]:
        state, treatment, batches = jax.tree.map(lambda x: x[0], (state, treatment, batches))
        filler = treatment.filler if filler_of(config) is not None else None

        def step(state: TrainState, own: tuple[Row, Any]) -> tuple[TrainState, dict[str, jax.Array]]:
            batch, ratio = own
            state, metrics = step_fn(state, batch, ratio, filler)
            return state, {name: metrics[name] for name in ("loss", "mask_fraction", "grad_norm")}

        state, measured = jax.lax.scan(step, state, (batches, treatment.ratios))
        found = {name: hits(definition, state.params, rows, at) for name, (rows, at) in questions.items()}
        return jax.tree.map(lambda x: x[None], (state, measured, found))

    members, everywhere = PartitionSpec(AXIS), PartitionSpec()
    # The model finds no axis in this mesh that it knows, so attention and loss take the path of a single device.
    sharded = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(members, members, members, everywhere),
        out_specs=members,
        check_vma=False,
    )
    return jax.jit(sharded, donate_argnums=0)


class _Program:
    """What trains the members whose configs have one key: the compiled turn, and their data."""

    def __init__(self, run: Run, config: ml_collections.ConfigDict, mesh: Mesh, every: int):
        self._config, self._every, self._mesh = config, every, mesh
        self._prepared = open_data(config, run.workdir)
        named = ml_collections.ConfigDict(config.to_dict())
        if filler_of(config) is not None:
            named.objective.name = FILLERS[0]
        self._turn = compile_turn(named, run.definition, mesh)
        # Of members that take the next turns, and of those that share their seeds.
        self.batches = functools.lru_cache(maxsize=4 * mesh.size)(self._batches)

    def _batches(self, seed: int, step: int) -> Row:
        """The batches of the steps after `step`, [steps, B, T + 1]."""
        size = self._config.global_batch_size
        first = step * size
        rows = [self._sequence(seed)[first + i] for i in range(self._every * size)]
        return jax.tree.map(lambda x: x.reshape(self._every, size, -1), stacked(rows))

    @functools.cache  # noqa: B019  A program lives as long as its experiment.
    def _sequence(self, seed: int) -> Any:
        return global_sequence(self._prepared, mixture(self._config), seed)

    def dispatch(self, members: Sequence[Member], questions: Any) -> tuple[TrainState, dict, dict]:
        """Starts a turn of these members, as many as there are devices or fewer."""
        filled = [*members, *[members[-1]] * (self._mesh.size - len(members))]
        over_members = NamedSharding(self._mesh, PartitionSpec(AXIS))

        def of_members(*own: np.ndarray) -> jax.Array:
            shape = (len(own), *np.shape(own[0]))
            return sharding.put(over_members, shape, lambda index: np.asarray(own[index[0].start or 0])[None])

        states = jax.tree.map(of_members, *(member.state for member in filled))
        treatments = jax.tree.map(of_members, *(self._treatment(member) for member in filled))
        batches = [self.batches(seed_of(member.config, "data"), member.step) for member in filled]
        return self._turn(states, treatments, jax.tree.map(of_members, *batches), questions)

    def _treatment(self, member: Member) -> Treatment:
        ratios = member.ratios[member.step : member.step + self._every]
        return Treatment(ratios, np.array(filler_of(member.config) or 0, np.int32))


# ---------------------------------------------------------------------------------------------------------------- turns


def train(
    run: Run,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    *,
    every: int,
    questions: Mapping[str, FactSet] | None = None,
    folder: epath.Path | None = None,
    keep: Collection[int] = (),
) -> list[Member]:
    """Trains every arm with every seed to `config.num_steps`.

    Args:
      run: its config is what arms change.
      arms: with different names.
      seeds: of the members; `seeds.*` of the config take their place where they are set.
      every: steps of a turn; divides `num_steps`.
      questions: that every member is asked at the end of each turn.
      folder: holds states, from which the same call goes on when it was interrupted; None: it begins anew.
      keep: steps whose parameters members keep. A member that goes on from `folder` lacks those of earlier ones.

    Returns:
      The members, arm by arm in each seed. Their records are {"step", "loss", "mask_fraction", "SET/accuracy"},
      the second and third as means over the turn.

    Raises:
      ConfigError: for a number of steps that `every` does not divide, or an arm that no run can be.
      Diverged: naming the first member with a loss that is not finite.
      Preempted: the machine is to be taken away; states are saved.
    """
    num_steps = run.config.num_steps
    if num_steps % every:
        raise ConfigError(f"num_steps is {num_steps}, but must be a multiple of the {every} steps between evaluations.")
    members = make_members(run, arms, seeds, every)
    with contextlib.ExitStack() as stack:
        if folder is not None:
            make_folder("workdir", folder)
            stack.enter_context(held(folder))
        _start(run, members, every, folder)
        _take_turns(run, members, every, questions or {}, folder, keep, stack.enter_context(notices()))
    return [member for member in members if member.is_asked_for]


def _take_turns(
    run: Run,
    members: Sequence[Member],
    every: int,
    questions: Mapping[str, FactSet],
    folder: epath.Path | None,
    keep: Collection[int],
    is_preempted: Callable[[int], bool],
) -> None:
    """Trains members to their last steps."""
    mesh = population_mesh(len(members), jax.devices())
    programs: dict[str, _Program] = {}
    everywhere = sharding.replicated(mesh)
    asked = {
        name: jax.tree.map(lambda x: sharding.put_whole(everywhere, x), (of_set.rows, of_set.at))
        for name, of_set in questions.items()
    }
    _log.info("%d members, %d steps each, on %d devices", len(members), run.config.num_steps, mesh.size)

    began = saved = time.perf_counter()
    total, at_first = steps_to_do(members, every), None
    while chosen := next_turn(members, mesh.size, every):
        key = chosen[0].program
        if key not in programs:
            programs[key] = _Program(run, chosen[0].config, mesh, every)
        turn = programs[key].dispatch(chosen, asked)
        for member in next_turn(members, mesh.size, every, running=chosen):  # Meanwhile, what comes next is read.
            step = member.step + every * (member in chosen)
            if member.program == key:
                programs[key].batches(seed_of(member.config, "data"), step)
        _settle(chosen, jax.device_get(turn), every, questions)
        for member in chosen:
            if member.step in keep:
                member.kept[member.step] = member.trained.params
            fork(member, every)
        is_last = is_preempted(chosen[0].step)
        if folder is not None and (is_last or time.perf_counter() - saved > SECONDS_BETWEEN_SAVES):
            save(folder, members)
            saved = time.perf_counter()
        if is_last:
            raise Preempted("all models are saved" if folder is not None else "nothing was to be saved")
        left = steps_to_do(members, every)
        at_first = at_first or (left, time.perf_counter())
        done = at_first[0] - left
        seconds = (time.perf_counter() - at_first[1]) / done * left if done else float("nan")
        newest = "  ".join(f"{m.name} {m.step}: {m.records[-1]['loss']:.3f}" for m in chosen)
        _log.info("%d of %d steps, %.0f s left   %s", total - left, total, seconds, newest)
    if folder is not None:
        save(folder, members)
    _log.info("trained in %.0f s", time.perf_counter() - began)


def _settle(members: Sequence[Member], turn: Any, every: int, questions: Mapping[str, FactSet]) -> None:
    """Gives members their new states and records."""
    states, measured, found = turn
    for i, member in enumerate(members):
        finite = np.isfinite(measured["loss"][i]) & np.isfinite(measured["grad_norm"][i])  # Else steps were skipped.
        if not finite.all():
            raise Diverged(
                f"the loss of {member.arm.name} with seed {member.seed}, or its gradient, is not finite by step "
                f"{member.step + every}: try a lower optimizer.learning_rate or a longer warm-up."
            )
        member.state = jax.tree.map(lambda x, i=i: x[i], states)
        member.step += every
        accuracies = {
            f"{name}/accuracy": float(of_set.correct(found[name][i]).mean()) for name, of_set in questions.items()
        }
        means = {name: float(measured[name][i].mean()) for name in ("loss", "mask_fraction")}
        member.records.append({"step": member.step, **means, **accuracies})


def _start(run: Run, members: Sequence[Member], every: int, folder: epath.Path | None) -> None:
    """Gives members the states that they start from, or were left with; forks without one wait for it."""
    imported = None
    if run.config.init_from is not None:
        imported = jax.device_get(imported_params(run)[0])
    first: dict[int, TrainState] = {}
    for member in members:
        config = member.config
        if member.seed not in first:
            make = functools.partial(init_state, config, run.definition)
            if imported is not None:
                make = functools.partial(state_of_params, config, imported)
            first[member.seed] = jax.device_get(jax.jit(make)())
        if folder is not None and restore(folder, member, first[member.seed]):
            continue
        if not 0 < fork_step(config, every) < config.num_steps:
            member.state = first[member.seed]
    for member in members:
        fork(member, every)
        if any(own.state is None and fork_step(own.config, every) < member.step for own in member.forks):
            # An arm that is new, or whose file is gone: what it starts from has gone on.
            member.state, member.step, member.records = first[member.seed], 0, []


# ----------------------------------------------------------------------------------------------------------- evaluation


class Evaluation(NamedTuple):
    """What evaluators found of one model."""

    metrics: dict[str, Interval]  # {"test_retrieval/loss": ..., ...}
    examples: dict[str, list[dict[str, Any]]]  # By evaluator.


def evaluation_mesh(config: ml_collections.ConfigDict, devices: Sequence[jax.Device]) -> Mesh:
    """One model at a time, the rows of a batch over as many devices as divide it."""
    num = math.gcd(config.global_batch_size // config.grad_accum_steps, len(devices))
    shape = [num if axis == "data" else 1 for axis in sharding.AXES]
    return Mesh(np.reshape(devices[:num], shape), sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


def evaluate(run: Run, members: Sequence[Member], evaluators: Mapping[str, Evaluator]) -> list[Evaluation]:
    """Runs evaluators on members that are trained, one after the other.

    Args:
      run: with the mesh to evaluate on.
      members: whose parameters are evaluated.
      evaluators: by name, as of `meap_jax.evals.make_evaluators`; made before training, so that a mistake shows then.
    """
    everywhere = sharding.replicated(run.mesh)
    found = []
    with jax.set_mesh(run.mesh):
        for member in members:
            params = jax.tree.map(lambda x: sharding.put_whole(everywhere, x), member.trained.params)
            results = {name: evaluator.run(params) for name, evaluator in evaluators.items()}
            metrics = {f"{name}/{key}": m for name, result in results.items() for key, m in result.metrics.items()}
            found.append(Evaluation(metrics, {name: result.examples for name, result in results.items()}))
    return found
