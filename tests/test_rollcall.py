"""The hosts of a run wait for each other: threads of this process that meet on the loopback interface."""

import json
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meap_jax import rollcall
from meap_jax.errors import ConfigError

SAME = {"jax": "0.12", "python": "3.12"}


@pytest.fixture
def address():
    """An address with a free port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return "{}:{}".format(*probe.getsockname())


class Threads:
    """Hosts as threads; keeps what each returned or raised, and what it said while it waited."""

    def __init__(self, address, count, timeout=20.0):
        self.address, self.count, self.timeout = address, count, timeout
        self.results, self.said, self.threads = {}, {}, []

    def start(self, name, host, facts=SAME):
        """Starts one; `name` tells two of the same host apart."""
        said = self.said[name] = []
        self.threads.append(threading.Thread(target=self._run, args=(name, host, facts, said.append), daemon=True))
        self.threads[-1].start()

    def _run(self, name, host, facts, say):
        try:
            if host == 0:
                found = rollcall.call(self.address, self.address, self.count, facts, self.timeout, say)
                for connection in found.values():
                    rollcall.send(connection, go=True)
            else:
                found = rollcall.answer(self.address, host, facts, self.timeout, say)
        except ConfigError as error:
            found = str(error)
        self.results[name] = found

    def wait(self):
        """What each returned, or the sentence that it raised."""
        for thread in self.threads:
            thread.join(60)
        return self.results


def test_hosts_that_come_in_any_order_find_each_other(address):
    hosts = Threads(address, 4)
    for host in (2, 0, 3, 1):
        hosts.start(host, host)
        time.sleep(0.1)
    results = hosts.wait()
    assert sorted(results[0]) == [1, 2, 3]
    for host in (1, 2, 3):  # Each has the connection that host 0 has to it.
        assert results[host].getpeername() == results[0][host].getsockname()
        assert results[host].getsockname()[1] == results[0][host].getpeername()[1]


def test_connections_stay_open_and_show_when_a_host_is_gone(address):
    hosts = Threads(address, 2)
    hosts.start(0, 0), hosts.start(1, 1)
    results = hosts.wait()
    results[0][1].settimeout(0.2)
    with pytest.raises(TimeoutError):
        results[0][1].recv(1)
    results[1].close()
    assert results[0][1].recv(1) == b""


def test_all_that_came_are_told_which_did_not(address):
    hosts = Threads(address, 4, timeout=2)
    hosts.start(0, 0), hosts.start(2, 2)
    results = hosts.wait()
    assert results[0] == results[2]
    assert results[0].startswith(f"hosts 1, 3 of 4 did not come to {address} within 2 s: start all of them")


def test_a_host_without_host_0_ends_with_its_address(address):
    hosts = Threads(address, 2, timeout=1)
    hosts.start(1, 1)
    assert f"host 0 did not answer host 1 at {address} within 1 s" in hosts.wait()[1]


def test_hosts_say_for_whom_they_wait(address, monkeypatch):
    monkeypatch.setattr(rollcall, "SECONDS_BETWEEN_WORDS", 0.3)
    hosts = Threads(address, 3)
    hosts.start(1, 1)
    time.sleep(1.2)
    hosts.start(0, 0)
    time.sleep(1.5)
    hosts.start(2, 2)
    assert sorted(hosts.wait()[0]) == [1, 2]
    assert any(said.startswith(f"waiting for host 0 at {address}, for") for said in hosts.said[1])
    for host in (0, 1):
        assert any(said.startswith("waiting for host 2 of 3, for") for said in hosts.said[host]), hosts.said
    assert hosts.said[2] == []


def test_every_host_is_told_whose_versions_differ(address):
    hosts = Threads(address, 3)
    for host in range(3):
        hosts.start(host, host, SAME | ({"jax": "0.10"} if host == 1 else {}))
    assert set(hosts.wait().values()) == {"host 1 has jax=0.10 and host 0 0.12: all hosts must run the same."}


def test_two_processes_with_one_number_are_told(address):
    hosts = Threads(address, 3)
    hosts.start(0, 0), hosts.start("one", 1)
    time.sleep(0.5)
    hosts.start("other", 1)
    results = hosts.wait()
    assert "two processes say that they are host 1" in results[0] and len(set(results.values())) == 1


def test_a_host_that_left_and_came_again_counts_once(address):
    hosts = Threads(address, 3)
    hosts.start(0, 0)
    time.sleep(0.5)
    with socket.create_connection(rollcall.split_address(address)) as early:
        rollcall.send(early, host=1, facts=SAME)
        time.sleep(0.5)
    time.sleep(0.5)
    hosts.start(1, 1), hosts.start(2, 2)
    assert sorted(hosts.wait()[0]) == [1, 2]


NO_HOST = json.dumps({"from": rollcall.GREETING, "host": "1", "facts": 3}).encode() + b"\n"


@pytest.mark.parametrize(
    "junk", [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100, b'{"from": 3}\n', b'["host"]\n', NO_HOST, b""]
)
def test_what_is_no_host_is_passed_over(address, junk):
    hosts = Threads(address, 2)
    hosts.start(0, 0)
    time.sleep(0.3)
    with socket.create_connection(rollcall.split_address(address)) as stranger:
        stranger.sendall(junk)
        hosts.start(1, 1)
        assert sorted(hosts.wait()[0]) == [1]


@pytest.mark.parametrize("answer", [b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" * 20, b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_host_that_finds_a_run_going_on_is_told(address, answer, monkeypatch):
    """The service of jax sends frames of HTTP/2."""
    monkeypatch.setattr(rollcall, "SECONDS_FOR_AN_OLD_RUN", 1.0)
    with socket.create_server(rollcall.split_address(address)) as server:

        def serve():
            while True:
                connection, _ = server.accept()
                connection.sendall(answer)
                connection.recv(1000)
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        hosts = Threads(address, 2)
        hosts.start(1, 1)
        assert f"a run is going on already at {address}, and host 1 comes too late" in hosts.wait()[1]


def test_host_0_waits_a_while_for_its_port_and_then_says_so(address, monkeypatch):
    monkeypatch.setattr(rollcall, "SECONDS_FOR_AN_OLD_RUN", 1.0)
    with socket.create_server(rollcall.split_address(address)):
        hosts = Threads(address, 2)
        hosts.start(0, 0)
        assert f"the port of {address} is in use on host 0" in hosts.wait()[0]
    monkeypatch.setattr(rollcall, "SECONDS_FOR_AN_OLD_RUN", 20.0)
    with socket.create_server(rollcall.split_address(address)):
        hosts = Threads(address, 2)
        hosts.start(0, 0), hosts.start(1, 1)
        time.sleep(1)
    assert sorted(hosts.wait()[0]) == [1]
    assert hosts.said[0] == [
        f"waiting for the port of {address}, which another program uses, such as a run that has just ended"
    ]


FACTS = st.dictionaries(st.sampled_from("abcd"), st.sampled_from(["1", "2"]))


@given(st.lists(FACTS, min_size=1, max_size=4))
def test_hosts_differ_exactly_if_their_facts_do(facts):
    sentence = rollcall.differences(dict(enumerate(facts)))
    assert (sentence == "") == all(other == facts[0] for other in facts)


def test_a_long_list_of_differences_is_cut():
    sentence = rollcall.differences({0: {}, 1: dict.fromkeys("abcdefg", "1")})
    assert sentence.startswith("host 1 has a=1 and host 0 nothing; ") and sentence.endswith("; and 3 differences more")
    assert rollcall.listed(range(10)) == "hosts 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
