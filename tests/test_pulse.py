"""Which hosts are gone, by their beats: times are given, nothing waits."""

from hypothesis import given
from hypothesis import strategies as st

from meap_jax.pulse import Pulse

TIMEOUT = 15.0


def test_a_host_that_beats_is_never_lost():
    pulse = Pulse({1, 2}, TIMEOUT, now=0.0)
    for second in range(100):
        pulse.hear({0: str(second), 1: str(second), 2: str(second // 10)}, float(second))
        assert pulse.lost(set(), float(second)) == ([], "")


def test_a_host_whose_beat_stays_the_same_is_lost_after_the_timeout():
    pulse = Pulse({1, 2}, TIMEOUT, now=0.0)
    for second in range(100):
        pulse.hear({1: str(second), 2: str(min(second, 20))}, float(second))
        hosts, sentence = pulse.lost(set(), float(second))
        assert hosts == ([2] if second - 20 > TIMEOUT else [])
        assert not hosts or sentence.startswith(f"host 2 gave no sign of life for {second - 20} s")


def test_a_closed_connection_makes_a_silent_host_lost_sooner_and_a_beating_one_not():
    pulse = Pulse({1, 2}, TIMEOUT, now=0.0)
    pulse.close(1, 0.0)
    pulse.close(2, 0.0)
    for second in range(5):
        pulse.hear({1: "0", 2: str(second)}, float(second))
        lost, sentence = pulse.lost(set(), float(second))
    assert lost == [1] and "host 1 ended without a word" in sentence


def test_hosts_that_said_that_they_end_are_not_missed():
    pulse = Pulse({1, 2}, TIMEOUT, now=0.0)
    pulse.close(1, 0.0)
    for second in range(40):
        pulse.hear({2: str(second)}, float(second))
        assert pulse.lost({1}, float(second)) == ([], "")


def test_without_answers_of_the_store_it_is_host_0_that_is_gone():
    pulse = Pulse({0, 1}, TIMEOUT, now=0.0)
    for second in range(16):
        assert pulse.lost(set(), float(second)) == ([], "")
    hosts, sentence = pulse.lost(set(), 16.0)
    assert hosts == [0] and sentence.startswith("host 0 can't be reached since 16 s")


def test_a_process_that_was_itself_stopped_judges_nobody_by_what_it_missed():
    pulse = Pulse({1}, TIMEOUT, now=0.0)
    pulse.hear({1: "1"}, 1.0)
    assert pulse.lost(set(), 1.0) == ([], "")
    for second in range(1001, 1016):  # It was stopped at 1 s, for 1,000 s.
        assert pulse.lost(set(), float(second)) == ([], "")
    assert pulse.lost(set(), 1017.0) != ([], "")  # It heard nothing since it goes on.


@given(st.lists(st.tuples(st.floats(0.1, 4.0), st.booleans()), max_size=60))
def test_a_host_is_lost_only_after_the_timeout_without_a_new_beat(rounds):
    pulse, now, heard = Pulse({1}, TIMEOUT, now=0.0), 0.0, 0.0
    for number, (pause, beats) in enumerate(rounds):
        now += pause
        heard = now if beats else heard
        pulse.hear({1: str(number)} if beats else {}, now)
        assert bool(pulse.lost(set(), now)[0]) == (now - heard > TIMEOUT)


def test_a_host_that_beats_on_after_its_connection_was_closed_is_no_longer_suspected():
    pulse = Pulse({1}, TIMEOUT, now=0.0)
    pulse.close(1, 0.0)
    for second in range(8):
        pulse.hear({1: str(second)}, float(second))
        assert pulse.lost(set(), float(second)) == ([], "")
    for second in range(8, 15):  # A gap that is shorter than the timeout, and longer than that of a closed connection.
        assert pulse.lost(set(), float(second)) == ([], "")
