"""Whether arrays fit into the memory of devices, asked before any of them is made."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from meap_jax.errors import ConfigError

# What holds the processes of a container: version 2 of control groups, and version 1.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_fits(shapes: Any, devices: Iterable[jax.Device], what: str, way_out: str) -> None:
    """Stops a run whose arrays no device here can hold, and without whose arrays it is nothing.

    What a program needs besides is not counted: what passes here may still be too large. (`meap_jax.aot` compiles the
    step and knows.)

    Args:
      shapes: a tree of ShapeDtypeStructs that carry shardings; of all of them at once.
      devices: of the mesh. Those that don't say how much they have are passed over, such as those of `meap_jax.aot`.
      what: the arrays are, for the sentence "WHAT takes 200 GB on a device".
      way_out: what would be valid, for the same sentence.

    Raises:
      ConfigError: naming what they take, and what there is.
    """
    share = sum(_bytes_on_a_device(x) for x in jax.tree.leaves(shapes))
    own = [device for device in devices if device.process_index == jax.process_index()]
    rooms = [room for device in own if device.platform != "cpu" and (room := _memory_of(device)) is not None]
    if rooms and share > min(rooms):
        raise ConfigError(
            f"{what} takes {_gb(share)} on a device, but {own[0].device_kind} has {_gb(min(rooms))}: {way_out}."
        )
    on_host = share * sum(device.platform == "cpu" for device in own)  # Devices of the CPU share the host's memory.
    if on_host > host_memory():
        raise ConfigError(f"{what} takes {_gb(on_host)}, but this machine has {_gb(host_memory())}: {way_out}.")


def host_memory() -> int:
    """The bytes of memory that this machine has, or those that the container of this process may use."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in map(Path, _LIMITS):
        try:
            found = min(found, int(limit.read_text()))
        except (OSError, ValueError):  # There is no such file, or "max" in it.
            continue
    return found


def _bytes_on_a_device(x: jax.ShapeDtypeStruct) -> int:
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    # Python's own numbers, which don't overflow; those of random keys have no itemsize of NumPy's.
    return int(np.prod(shape, dtype=object)) * getattr(x.dtype, "itemsize", 8)


def _memory_of(device: jax.Device) -> int | None:
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except (jax.errors.JaxRuntimeError, NotImplementedError):  # A device that isn't here.
        return None


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
