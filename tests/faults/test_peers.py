"""What the hosts of a run do when one is killed, hangs or fails: real processes of a command that trains nothing."""

import signal
import time

import pytest

from host_processes import NOISE, OTHERS_WAIT, assert_says, programs

AGAIN = "Start the run again: it goes on from its last checkpoint."


def test_an_error_that_nobody_expected_has_its_traceback_on_its_host_alone():
    with programs(OTHERS_WAIT.format(who=1) + "len(3)") as group:
        assert group.codes(60) == [1, 1, 1]
        assert_says(group, 1, traceback=True)
        for host in (0, 2):
            assert_says(group, host, "error: host 1 stopped: TypeError: object of type 'int' has no len().")


@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize("way", ["os._exit(7)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_others_stop_within_seconds_of_a_host_that_is_killed(who, way):
    with programs(OTHERS_WAIT.format(who=who) + way) as group:
        for host in range(3):
            group.wait_for(host, "together") if host != who else group.processes[host].wait()
        began = time.monotonic()
        codes = group.codes(60)
        assert time.monotonic() - began < 10
        assert codes.pop(who) in (7, -signal.SIGKILL) and codes == [143, 143]
        for host in {0, 1, 2} - {who}:
            reason = f"host {who} ended without a word, as if killed; its log or its machine's may say why"
            assert_says(group, host, f"error: {reason}. {AGAIN}")


@pytest.mark.parametrize("who", [0, 2])
def test_others_stop_when_a_host_hangs(who):
    with programs("threading.Event().wait()", MEAP_JAX_HOST_TIMEOUT_SECONDS="6") as group:
        for host in range(3):
            group.wait_for(host, "together")
        group.send(who, signal.SIGSTOP)
        assert group.codes(60, but=(who,)) == [143, 143]
        for host in {0, 1, 2} - {who}:
            assert f"error: host {who} gave no sign of life for 6 s; it hangs, or its machine is" in group.said(host)
            assert not any(word in group.said(host) for word in NOISE)


@pytest.mark.parametrize("kind", ["RuntimeError", "ValueError"])
def test_an_error_of_gloo_is_not_what_is_said_of_a_host_that_is_killed(kind):
    body = (
        "if host == 1: os._exit(9)\n"
        f"raise {kind}('UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:1234')"
    )
    with programs(body) as group:
        codes = group.codes(60)
        assert (codes.pop(1), codes) == (9, [143, 143])
        for host in (0, 2):
            assert "error: host 1 ended without a word" in group.said(host)
            assert not any(word in group.said(host) for word in (*NOISE, "Traceback", "Gloo"))


def test_a_connection_that_fails_between_hosts_that_live_is_named():
    body = "if host != 1: threading.Event().wait()\nraise RuntimeError('Gloo AllReduce failed: Connection reset')"
    with programs(body, count=2, MEAP_JAX_HOST_TIMEOUT_SECONDS="3") as group:
        assert group.codes(60) == [143, 143]
        for host in (0, 1):
            assert "error: host 1 lost its connection to the others, which are all alive (RuntimeE" in group.said(host)
            assert "Traceback" not in group.said(host)


def test_a_mistake_that_all_make_is_said_once_by_each():
    with programs("raise DataError(f'the same everywhere.')") as group:
        assert group.codes(60) == [1, 1, 1]
        for host in range(3):
            assert_says(group, host, "error: the same everywhere.")


def test_ctrl_c_on_one_host_stops_all():
    with programs("while True: time.sleep(0.1)") as group:
        group.wait_for(1, "together")
        group.send(1, signal.SIGINT)
        assert group.codes(60) == [130, 130, 130]
        assert "stopped; what was saved is kept." in group.said(1)
        assert_says(group, 0, "error: host 1 stopped: it was interrupted.")


def test_a_host_can_stop_the_others_with_a_code_of_its_own():
    body = OTHERS_WAIT.format(who=1) + "peers.stop('step 7 takes longer than 60 s', 142)"
    with programs(body) as group:
        assert group.codes(60) == [142, 142, 142]
        assert_says(group, 2, "error: host 1 stopped: step 7 takes longer than 60 s.")


def test_all_hosts_write_their_stacks_when_one_asks(tmp_path):
    body = (
        f"if host == 1: time.sleep(2), peers.ask_for_stacks(epath.Path({str(tmp_path / 'stacks')!r}))\n"
        "def hangs_here(): threading.Event().wait(12)\n"
        "hangs_here() if host != 1 else time.sleep(5)"
    )
    with programs(body) as group:
        assert group.codes(60) == [0, 0, 0]
        for host in range(3):
            words = [f"stacks of host {host}:", "hangs_here" if host != 1 else "ask_for_stacks"]
            assert all(word in group.said(host) for word in words), group.everything()
            assert words[1] in (tmp_path / "stacks" / f"host-{host}.txt").read_text()


def test_who_waits_for_the_facts_of_a_killed_host_ends():
    with programs("if host == 1: os._exit(9)\npeers.check_same('topic', {}, '')") as group:
        codes = group.codes(60)
        assert (codes.pop(1), codes) == (9, [143, 143])
