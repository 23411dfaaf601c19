"""Processes that share the work of preparing data on one machine."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from meap_jax.errors import DataError

_T = TypeVar("_T")


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """A pool whose processes end at once with Ctrl-C, and don't outlive this one; at its end the rest is dropped.

    Raises:
      DataError: a worker was killed.
    """
    # Spawned: a process in which JAX's threads run can't be forked safely.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_start) as pool:
        try:
            # Held back from workers until they know what to do with it: one that still imports would print a traceback.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                for _ in range(workers):
                    pool.submit(int)  # Starts one.
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield pool
        except concurrent.futures.process.BrokenProcessPool as error:
            raise DataError(
                "a worker was killed, as happens when memory runs out: start again for what is missing."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def map_ahead(
    pool: concurrent.futures.Executor, ahead: int, function: Callable[[Any], _T], items: Iterable[Any]
) -> Iterator[_T]:
    """As `pool.map`, but takes no more than `ahead` items before their results are asked for."""
    pending: deque[concurrent.futures.Future[_T]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) == ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _start() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # There is a process a core already.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are spawned"

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
