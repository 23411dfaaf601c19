"""Watches the numbers of a run: steps that are not finite, spikes of the loss, and steps that can't be repeated."""

import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from meap_jax import integrity
from meap_jax.errors import Diverged, UserError

_log = logging.getLogger(__name__)

LEAST_LOSSES = 10  # Before a loss can be a spike.


class Spike(Exception):
    """A loss from which the run is to go back to its last checkpoint."""


class NotDeterministic(UserError, RuntimeError):
    """The same step came out with other bits."""


class Monitor:
    """Judges each step by its loss and its norms.

    What it remembers is a part of checkpoints, so that a resumed run judges as one that was never interrupted.
    """

    def __init__(self, settings: ml_collections.ConfigDict, state: dict[str, Any] | None = None):
        """Begins.

        Args:
          settings: `numerics` of a config.
          state: of `get_state`, to go on from.
        """
        self._settings = settings
        state = state or {}
        self._losses: list[float] = list(state.get("losses", []))
        self._skipped: int = state.get("skipped", 0)  # In a row.
        self._rewinds: int = state.get("rewinds", 0)

    def get_state(self) -> dict[str, Any]:
        """What it remembers, of JSON's types."""
        return {"losses": list(self._losses), "skipped": self._skipped, "rewinds": self._rewinds}

    def go_back(self, state: dict[str, Any]) -> None:
        """Remembers what it did in an earlier state, and that it has gone back."""
        rewinds = self._rewinds + 1
        self.__init__(self._settings, state)  # type: ignore[misc]
        self._rewinds = rewinds

    def judge(self, step: int, values: dict[str, float], rows: Callable[[], str]) -> bool:
        """Judges a step; says in the log what is wrong with it.

        Args:
          step: counted from 1.
          values: its `loss`, `grad_norm` and, if there are, other norms.
          rows: says which data it was trained on.

        Returns:
          Whether the run is to go back to its last checkpoint.

        Raises:
          Diverged: its parameters are not finite, or more steps were skipped than may be.
        """
        loss, grad_norm = values["loss"], values["grad_norm"]
        for name in ("param_norm", "update_norm"):  # Finite where an update was skipped.
            if not math.isfinite(values.get(name, 0.0)):
                raise Diverged(
                    f"step {step}: {name} is {values[name]}, which must be finite, and the loss is {loss}. The last "
                    "checkpoint is kept; try a lower optimizer.learning_rate or a longer warm-up."
                )
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skip(step, loss, grad_norm, rows())
            return False
        self._skipped = 0
        return self._is_spike(step, loss, rows)

    def _skip(self, step: int, loss: float, grad_norm: float, rows: str) -> None:
        self._skipped += 1
        limit = self._settings.max_skipped
        said = f"step {step}: the loss is {loss} and the gradient norm {grad_norm}, which must be finite"
        if self._skipped > limit:
            raise Diverged(
                f"{said}, and so it was in {self._skipped} steps in a row, where numerics.max_skipped is {limit}. The "
                "last checkpoint is kept; try a lower optimizer.learning_rate or a longer warm-up."
            )
        _log.warning(
            "%s: the update is skipped (%d of at most %d in a row), host %d of %d; the data is %s",
            said, self._skipped, limit, jax.process_index(), jax.process_count(), rows,
        )  # fmt: skip

    def _is_spike(self, step: int, loss: float, rows: Callable[[], str]) -> bool:
        if not self._settings.spike:
            return False
        before = self._losses
        self._losses = [*before, loss][-self._settings.spike_window :]
        if len(before) < LEAST_LOSSES:
            return False
        median = float(np.median(before))
        deviation = float(np.median(np.abs(np.array(before) - median)))
        if loss - median <= self._settings.spike * deviation:
            return False
        is_to_go_back = self._rewinds < self._settings.max_rewinds
        what = "the run goes back to its last checkpoint" if is_to_go_back else "the run goes on"
        times = (loss - median) / max(deviation, 1e-12)
        _log.warning(
            "step %d: the loss %.4f is a spike, %.1f median absolute deviations above the median %.4f of the last %d "
            "steps; the data is %s; %s", step, loss, times, median, len(before), rows(), what,
        )  # fmt: skip
        return is_to_go_back


def check_finite(step: int, name: str, value: float) -> None:
    """Stops a run whose model gives losses on held-out data that are no numbers.

    Raises:
      Diverged: naming the step, the metric and its value.
    """
    if not math.isfinite(value):
        raise Diverged(
            f"step {step}: {name} is {value}, which must be finite, though the loss of training is. The last "
            "checkpoint is kept; try a lower optimizer.learning_rate, or model.dtype=float32."
        )


def taken_twice(step_fn: Callable) -> Callable:
    """Makes a step that is taken twice from the same state and compared: twice the time, and the state twice in memory.

    The step raises NotDeterministic, naming what differs, if a bit does.
    """

    def checked(state: Any, batch: Any) -> Any:
        first = step_fn(jax.tree.map(jnp.copy, state), batch)
        second = step_fn(state, batch)
        one, other = (
            integrity.checksums(dict(zip(("state", "metrics"), found, strict=True))) for found in (first, second)
        )
        differing = [name for name in one if one[name] != other[name]]
        if differing:
            with jax.transfer_guard("allow"):
                step = int(second[0].step)
            raise NotDeterministic(
                f"step {step} came out otherwise when it was repeated: "
                f"{', '.join(differing[:5])}{' and others' if len(differing) > 5 else ''} differ. On GPUs set "
                "XLA_FLAGS=--xla_gpu_deterministic_ops=true; elsewhere a device may be faulty."
            )
        return second

    return checked


def check_replicas(step: int, state: Any, mesh: jax.sharding.Mesh) -> None:
    """Compares what devices hold several times, such as the parameters of data-parallel training.

    Raises:
      Diverged: naming the step, an array, and the devices and hosts that differ from the others.
    """
    found = integrity.differing_replicas(state, mesh)
    if not found:
        return
    host_of = {device.id: device.process_index for device in mesh.devices.flat}
    first = found[0]
    where = ", ".join(f"device {device} of host {host_of[device]}" for device in first.devices)
    raise Diverged(
        f"after step {step} the copies of {first.name} differ between devices ({where}), as do those of "
        f"{len(found) - 1} other arrays: a device computes wrongly, or its memory is damaged. Take that host out and "
        "start again: the run goes on from its last checkpoint, which was compared before it was saved."
    )
