"""Notices that the machines of a run are to be taken away, so that it saves and ends in time.

Such a notice is SIGTERM: Google's spot slices, Slurm, Kubernetes and SkyPilot send it some seconds before they end a
process.
"""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def notices() -> Iterator[Callable[[int], bool]]:
    """Yields a function of a step that says whether to save after it and end.

    In this block SIGTERM does nothing else. The function must be called after each step, on all processes. Where there
    are several, the notice of one reaches all, and each of them answers yes after the same step
    (`jax.experimental.multihost_utils.reached_preemption_sync_point`).
    """
    if jax.distributed.is_initialized():
        yield multihost_utils.reached_preemption_sync_point  # Jax has a handler of its own then.
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # Only the main thread can be told of signals.
        return
    is_noticed = threading.Event()

    def notice(number: int, frame: FrameType | None) -> None:
        is_noticed.set()

    before = signal.signal(signal.SIGTERM, notice)
    try:
        yield lambda step: is_noticed.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
