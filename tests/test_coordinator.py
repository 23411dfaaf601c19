"""The process of jax's coordination service: what it says against wrong arguments, and when it ends."""

import contextlib
import socket
import threading
import time

import pytest

from meap_jax import coordinator
from meap_jax.coordinator import Coordinator


@pytest.fixture
def service():
    """A service for two hosts on a port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = "{}:{}".format(*probe.getsockname())
    with contextlib.closing(Process(address)) as process:
        yield process


class Process:
    """A coordinator, and whether one can still connect to its port."""

    def __init__(self, address):
        self.coordinator, self.address = Coordinator(), address
        self.coordinator.serve(address, 2)
        self.close = self.coordinator.shutdown

    def answers(self):
        host, port = self.address.split(":")
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(port)), timeout=5):
            return True
        return False


def test_a_service_that_can_not_begin_is_an_error():
    second = Coordinator()
    with socket.create_server(("127.0.0.1", 0)) as another, pytest.raises(RuntimeError):
        second.serve("{}:{}".format(*another.getsockname()), 2)
    second.shutdown()


def test_it_ends_after_the_other_hosts(service):
    # All have said that they leave, but one hears late that the others did.
    here, there = socket.socketpair()
    service.coordinator.outlive([here])
    alive = []

    def end():
        time.sleep(1)
        alive.append(service.answers())
        there.close()

    threading.Thread(target=end).start()
    service.coordinator.shutdown()
    assert alive == [True] and not service.answers()


def test_it_waits_for_ever_for_none(service, monkeypatch):
    monkeypatch.setattr(coordinator, "SECONDS_TO_OUTLIVE", 0.5)
    here, _there = socket.socketpair()
    service.coordinator.outlive([here])
    service.coordinator.shutdown()
    assert not service.answers()
