"""How the hosts of a run share facts, wait for each other and end: real processes of a command that trains nothing."""

import pytest

from host_processes import OTHERS_WAIT, assert_says, programs


@pytest.mark.parametrize("who", [0, 2])
def test_others_stop_with_the_sentence_of_a_host_that_stops(who):
    with programs(OTHERS_WAIT.format(who=who) + "raise DataError('text.jsonl is empty.')") as group:
        assert group.codes(60) == [1, 1, 1]
        for host in range(3):
            prefix = "" if host == who else f"host {who} stopped: "
            assert_says(group, host, f"error: {prefix}text.jsonl is empty.")


@pytest.mark.parametrize("code", [0, 143])
def test_hosts_that_end_in_good_order_wait_for_each_other(code):
    with programs(f"time.sleep(7 * (host == 1))\nsys.exit({code})", MEAP_JAX_HOST_TIMEOUT_SECONDS="4") as group:
        assert group.codes(60) == [code] * 3
        for host in range(3):
            assert_says(group, host)


def test_facts_are_compared_and_every_host_says_what_differs():
    body = (
        "time.sleep(2 * (host == 0))\n"
        "peers.check_same('first', {'a.b': '1'}, 'never said.')\n"
        "peers.check_same('first', {'a.b': '1' if host != 2 else '0.1', 'c': 'x'}, 'do better.')"
    )
    with programs(body) as group:
        assert group.codes(60) == [1, 1, 1]
        for host in range(3):
            assert_says(group, host, "error: host 2 has a.b=0.1 and host 0 1: do better.")


def test_the_others_wait_for_what_the_first_does():
    body = "if host == 0: time.sleep(3)\npeers.wait_for_first('work')\nprint(f'at {time.time()}', file=sys.stderr)"
    with programs(body) as group:
        assert group.codes(60) == [0, 0, 0]
        times = [float(group.said(host).rpartition("at ")[2]) for host in range(3)]
        assert max(times) - min(times) < 2


def test_a_process_alone_is_left_to_itself(tmp_path):
    """The same program without a cluster: errors end as ever, and stacks are its own."""
    from etils import epath

    from meap_jax import peers

    with pytest.raises(KeyError), peers.telling(finishes=True):
        raise KeyError("left as it is")
    peers.check_same("topic", {"a": "1"}, "")
    peers.wait_for_first("work")
    peers.stop("reason", 1)
    peers.ask_for_stacks(epath.Path(tmp_path) / "stacks")
    assert "test_a_process_alone" in (tmp_path / "stacks" / "host-0.txt").read_text()
