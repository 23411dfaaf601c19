"""The process of jax's coordination service: how it begins, and when it ends."""

import socket
import threading
import time

import pytest

from meap_jax import coordinator
from meap_jax.coordinator import Coordinator


@pytest.fixture
def address():
    """A port of this host that is free."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()


@pytest.fixture
def service(address):
    """A service for two hosts there."""
    service = Coordinator().serve("{}:{}".format(*address), 2)
    yield service
    service.shutdown()


def answers(address):
    """Whether there is somebody at this port."""
    try:
        socket.create_connection(address, timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_service_that_cannot_begin_is_an_error():
    second = Coordinator()
    with socket.create_server(("127.0.0.1", 0)) as another, pytest.raises(RuntimeError):
        second.serve("{}:{}".format(*another.getsockname()), 2)
    second.shutdown()


def test_it_ends_after_the_other_hosts(service, address):
    # All have said that they leave, but one hears late that the others did.
    here, there = socket.socketpair()
    service.outlive([here])
    alive = []

    def end():
        time.sleep(1)
        alive.append(answers(address))
        there.close()

    threading.Thread(target=end).start()
    service.shutdown()
    assert alive == [True] and not answers(address)


def test_a_host_that_does_not_end_is_waited_for_but_not_for_ever(service, address, monkeypatch):
    monkeypatch.setattr(coordinator, "SECONDS_TO_OUTLIVE", 0.5)
    here, _there = socket.socketpair()
    service.outlive([here])
    service.shutdown()
    assert not answers(address)
