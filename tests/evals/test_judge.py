"""The judge against an endpoint that answers well, slowly, wrongly and not at all."""

import json
import socket
import threading
import time

import pytest

from judge_server import completion, serving
from meap_jax.errors import ConfigError, DataError
from meap_jax.evals import endpoint
from meap_jax.evals.endpoint import Endpoint, TransientError, completion_of, seconds_of
from meap_jax.evals.judge import Judge, request_hash, request_of, score_of
from meap_jax.evals.request_log import RequestLog

KEY = "sk-secret-123"
PAIRS = [(f"output {i}", f"reference {i}") for i in range(6)]
GOOD = completion("Score: 1\nThey agree.")


def judge_at(url, folder, *, budget=100, model="tester", timeout=5.0, waits=None):
    """A judge that doesn't wait, but notes for how long it would have."""
    waits = [] if waits is None else waits
    return Judge(Endpoint(url, KEY, timeout), model, budget, RequestLog(folder / "judge.jsonl"), wait=waits.append)


def lines(folder):
    return [json.loads(line) for line in (folder / "judge.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------- requests and replies


def test_a_request_shows_the_output_and_the_reference_and_asks_at_temperature_0():
    body = request_of("m", " An {output}.\n", "The <reference>.")
    assert (body["model"], body["temperature"]) == ("m", 0)
    [message] = body["messages"]
    assert message["role"] == "user" and 'the form "Score: xx"' in message["content"]
    assert "<model_output>\nAn {output}.\n</model_output>" in message["content"]
    assert "<predicted_label>\nThe <reference>.\n</predicted_label>" in message["content"]
    others = (request_of("n", " An {output}.\n", "The <reference>."), request_of("m", "An", "The <reference>."))
    assert request_hash(body) not in map(request_hash, others)
    assert request_hash(body) == request_hash(request_of("m", "An {output}.", "The <reference>."))


@pytest.mark.parametrize(
    "reply, score",
    [
        ("Score: 1\nBoth say that the road is closed.", 1),
        ("score: 0. Other facts.", 0),
        ("**Score:** 0\n\nThe label names 3 people.", 0),
        ("**Score: 1**", 1),
        ("They agree on 12 points.\nSCORE = 1", 1),
        ('{"score": 1, "explanation": "alike"}', 1),
        ("Score: 1.0", 1),
        ("Score: 1, as 2 of 3 facts agree.", 1),
        ("<think>Perhaps Score: 1?</think>\nScore: 0", 0),
        ("Score: 1\nThe final Score: 1", 1),
        ("Score: xx", None),
        ("Score: 10", None),
        ("Score: 0.5", None),
        ("Score: 1/10", None),
        ("Score: 0 or 1", None),
        ("Score: 0-1", None),
        ("Score: -1", None),
        ("Score: 2", None),
        ("Score (0 or 1): high", None),
        ("Underscore: 1", None),
        ("Score:\n1. The output", None),
        ("Score: 1\nOn second thoughts, Score: 0", None),
        ("1", None),
        ("I cannot compare these.", None),
        ("", None),
    ],
)
def test_a_score_is_read_from_what_says_one_and_from_nothing_else(reply, score):
    if score is None:
        with pytest.raises(ValueError, match="score"):
            score_of(reply)
    else:
        assert score_of(reply) == score


@pytest.mark.parametrize(
    "body", ["", "<html>", "[]", "null", "{}", '{"choices": []}', '{"error": {"message": "busy"}}']
)
def test_what_is_no_completion_is_named(body):
    with pytest.raises(ValueError, match="no chat completion"):
        completion_of(body.encode())


def test_a_completion_may_have_no_text():
    assert completion_of(completion(None).encode()) == "" and completion_of(GOOD.encode()).startswith("Score: 1")


def test_retry_after_is_seconds_or_a_date():
    assert seconds_of("7", 0) == 7 and seconds_of("-3", 0) == 0 and seconds_of(None, 0) is None
    assert seconds_of("Thu, 01 Jan 1970 00:01:40 GMT", now=40) == 60
    assert seconds_of("Thu, 01 Jan 1970 00:01:40 GMT", now=400) == 0
    assert seconds_of("soon", 0) is None


# ---------------------------------------------------------------------------------------------------- answering well


def test_verdicts_come_in_order_and_are_asked_for_once(tmp_path):
    def answer(_, body):
        return completion(f"Score: {int('output 3' in body['messages'][0]['content'])}\nWhy.")

    with serving(answer) as server:
        found = judge_at(server.url, tmp_path).verdicts([*PAIRS, PAIRS[3]])
        assert [verdict.score for verdict in found] == [0, 0, 0, 1, 0, 0, 1] and found[3].reply == "Score: 1\nWhy."
        path, headers, body = server.requests[0]
        assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
        assert body["temperature"] == 0 and len(server.requests) == 6
        again = judge_at(server.url, tmp_path, budget=0).verdicts(PAIRS)
        assert again == found[:6] and len(server.requests) == 6
        with pytest.raises(ConfigError, match="judge_budget is 0"):  # Another judge has said nothing yet.
            judge_at(server.url, tmp_path, budget=0, model="other").verdicts(PAIRS)
    assert KEY not in (tmp_path / "judge.jsonl").read_text()


def test_a_few_requests_are_made_at_a_time(tmp_path):
    together = threading.Barrier(4, timeout=5)

    def answer(number, _):
        if number < 4:
            together.wait()  # Breaks, and the test with it, if fewer come at a time.
        return GOOD

    with serving(answer) as server:
        assert len(judge_at(server.url, tmp_path).verdicts(PAIRS)) == len(server.requests) == 6


# --------------------------------------------------------------------------------------------- slowly and not at all


def test_what_comes_too_late_is_asked_for_again(tmp_path):
    waits = []
    with serving(lambda number, _: 0.4 if number == 0 else GOOD) as server:
        [verdict] = judge_at(server.url, tmp_path, timeout=0.1, waits=waits).verdicts(PAIRS[:1])
    assert verdict.score == 1 and len(server.requests) == 2 and 1 <= waits[0] <= 1.5
    assert "timed out" in lines(tmp_path)[0]["error"]


def test_an_answer_that_trickles_is_too_late_too(tmp_path):
    listener = socket.create_server(("127.0.0.1", 0))

    def trickle():
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        with connection:
            for _ in range(20):  # A byte each 0.05 s, never 0.3 s without one.
                try:
                    connection.sendall(b" ")
                except OSError:
                    return
                time.sleep(0.05)

    thread = threading.Thread(target=trickle, daemon=True)
    thread.start()
    with pytest.raises(TransientError, match="timed out"):
        Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}", None, 0.3).ask({})
    listener.close()
    thread.join(5)


def test_nobody_there_is_one_sentence_after_six_tries_with_growing_waits(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    waits = []
    with pytest.raises(
        ConfigError, match=r"judge_url is http://127.*failed 6 times .*refused.*the same command goes on"
    ):
        judge_at(url, tmp_path, waits=waits).verdicts(PAIRS[:1])
    assert all(2**i <= wait <= 1.5 * 2**i for i, wait in enumerate(waits)) and len(waits) == 5
    assert len(lines(tmp_path)) == 6


def test_a_closed_connection_is_asked_again(tmp_path):
    with serving(lambda number, _: None if number < 2 else GOOD) as server:
        assert judge_at(server.url, tmp_path).verdicts(PAIRS[:1])[0].score == 1
    assert len(server.requests) == 3


# ------------------------------------------------------------------------------------------------------------ wrongly


@pytest.mark.parametrize("wrong", [(500, {}, "oops"), (503, {}, ""), (408, {}, ""), "<html>not JSON", '{"error": "x"}'])
def test_an_error_of_the_server_is_asked_again(tmp_path, wrong):
    with serving(lambda number, _: wrong if number == 0 else GOOD) as server:
        assert judge_at(server.url, tmp_path).verdicts(PAIRS[:1])[0].score == 1
    assert len(server.requests) == 2 and ["error" in line for line in lines(tmp_path)] == [True, False]


def test_a_server_that_says_when_to_come_back_is_left_alone_until_then(tmp_path):
    waits = []
    busy = (429, {"Retry-After": "30"}, "slow down")
    with serving(lambda number, _: busy if number == 0 else GOOD) as server:
        judge_at(server.url, tmp_path, waits=waits).verdicts(PAIRS[:1])
    assert 30 <= waits[0] <= 45
    with serving(lambda *_: (429, {"Retry-After": "86400"}, "tomorrow")) as server:
        with pytest.raises(ConfigError, match="wants to be left alone for 86400 s .status 429: tomorrow"):
            judge_at(server.url, tmp_path, model="other", waits=waits).verdicts(PAIRS[:1])
    assert len(server.requests) == 1 and len(waits) == 1


@pytest.mark.parametrize("status, said", [(401, "check OPENAI_API_KEY"), (402, "no money"), (404, "judge_model")])
def test_a_setting_that_is_wrong_stops_at_once_and_shows_no_key(tmp_path, status, said):
    with serving(lambda *_: (status, {}, f"no money for {KEY}")) as server:
        with pytest.raises(ConfigError, match=f"status {status}") as caught:
            judge_at(server.url, tmp_path).verdicts(PAIRS)
    assert len(server.requests) <= 4 and said in str(caught.value)  # Those that were under way.
    assert KEY not in str(caught.value) + (tmp_path / "judge.jsonl").read_text()
    assert ("no money" in str(caught.value)) == (status != 401)  # Servers repeat the ends of a key that is wrong.


def test_a_failure_ends_the_waits_of_the_others(tmp_path):
    def answer(_, body):
        if "output 0" in body["messages"][0]["content"]:
            return (429, {"Retry-After": "10"}, "")
        time.sleep(0.1)
        return (401, {}, "")

    with serving(answer) as server:
        judge = Judge(Endpoint(server.url, KEY), "tester", 100, RequestLog(tmp_path / "judge.jsonl"))
        start = time.monotonic()
        with pytest.raises(ConfigError, match="status 401"):
            judge.verdicts(PAIRS[:2])
    assert time.monotonic() - start < 5 and len(server.requests) == 2


def test_an_answer_without_end_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(endpoint, "_MOST_BYTES", 500)
    with serving(lambda number, _: completion("Score: 1" + " " * 600 * (number == 0))) as server:
        assert judge_at(server.url, tmp_path).verdicts(PAIRS[:1])[0].score == 1
    assert "more than 500 bytes" in lines(tmp_path)[0]["error"]


def test_a_redirect_does_not_take_the_key_elsewhere(tmp_path):
    with serving(lambda *_: GOOD) as other, serving(lambda *_: (302, {"Location": other.url}, "")) as server:
        with pytest.raises(ConfigError, match="status 302"):
            judge_at(server.url, tmp_path).verdicts(PAIRS[:1])
    assert not other.requests


def test_nonsense_is_asked_for_once_more_and_then_counted_and_remembered(tmp_path):
    def answer(_, body):
        earlier = sum(body == asked for _, _, asked in server.requests) - 1
        stubborn = "output 0" in body["messages"][0]["content"]
        return completion("Well." if stubborn or not earlier else "Score: 0")

    with serving(answer) as server:
        first = judge_at(server.url, tmp_path).verdicts(PAIRS[:2])
        assert [verdict.score for verdict in first] == [None, 0] and first[0].reply == "Well."
        assert len(server.requests) == 4
        assert judge_at(server.url, tmp_path, budget=0).verdicts(PAIRS[:2]) == first


def test_texts_that_a_filter_refuses_are_left_without_a_score(tmp_path):
    def answer(_, body):
        return (400, {}, "content risk") if "politics" in body["messages"][0]["content"] else GOOD

    pairs = [(f"output {i} {'politics' * (i >= 8)}", "reference") for i in range(12)]
    with serving(answer) as server:
        found = judge_at(server.url, tmp_path).verdicts(pairs)
        assert [verdict.score for verdict in found] == [1] * 8 + [None] * 4 and len(server.requests) == 12
        assert "status 400: content risk" in found[8].reply
        # They are asked for again, as filters change; the replies to others show that the setting is right.
        assert judge_at(server.url, tmp_path).verdicts(pairs[7:]) == found[7:] and len(server.requests) == 16


def test_an_endpoint_that_refuses_everything_stops(tmp_path):
    with serving(lambda *_: (400, {}, "no model tester")) as server:
        with pytest.raises(ConfigError, match="refused the first 3 .*'tester'.*no model tester"):
            judge_at(server.url, tmp_path).verdicts([(f"output {i}", "reference") for i in range(20)])
    assert len(server.requests) <= 2 + 4  # The third of four threads that are refused stops all.


# ------------------------------------------------------------------------------------------------- budget and resuming


def test_a_spent_budget_keeps_all_replies_and_a_larger_one_goes_on(tmp_path):
    with serving(lambda number, _: (500, {}, "") if number == 0 else GOOD) as server:
        for _ in range(2):  # The second time it is spent from the start.
            with pytest.raises(ConfigError, match="judge_budget is 4, and tester has had 4 requests"):
                judge_at(server.url, tmp_path, budget=4).verdicts(PAIRS)
            assert len(server.requests) == len(lines(tmp_path)) == 4
        found = judge_at(server.url, tmp_path, budget=7).verdicts(PAIRS)
    assert [verdict.score for verdict in found] == [1] * 6 and len(server.requests) == 7


def test_a_half_line_of_a_killed_process_is_asked_for_again(tmp_path):
    with serving(lambda *_: GOOD) as server:
        judge_at(server.url, tmp_path).verdicts(PAIRS)
        data = (tmp_path / "judge.jsonl").read_bytes()
        (tmp_path / "judge.jsonl").write_bytes(data[:-9])
        assert len(judge_at(server.url, tmp_path).verdicts(PAIRS)) == 6 and len(server.requests) == 7
        assert len(lines(tmp_path)) == 6


@pytest.mark.parametrize("line", ["{", "[1]", '{"judge": "x", "request": "y"}', '{"judge": "x", "reply": "Score: 1"}'])
def test_a_damaged_log_is_named_with_its_line_and_stays(tmp_path, line):
    good = json.dumps({"judge": "tester", "request": "x", "reply": "Score: 1"})
    (tmp_path / "judge.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match="judge.jsonl, line 2 is no request to a judge"):
        RequestLog(tmp_path / "judge.jsonl")
    assert (tmp_path / "judge.jsonl").read_text() == f"{good}\n{line}\n"


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://a/v1", "http://", "https://me:pw@a.b/v1", "https://a/v1?key=pw", "http://a:x/",
            "http://a b/v1"],
)  # fmt: skip
def test_an_address_that_is_none_or_holds_a_secret_is_refused_without_showing_it(url):
    with pytest.raises(ConfigError, match="judge_url is .* must be like http://localhost") as caught:
        Endpoint(url, None)
    assert "pw" not in str(caught.value)


def test_a_key_that_no_header_can_hold_is_refused_without_showing_it():
    with pytest.raises(ConfigError, match="OPENAI_API_KEY holds a character") as caught:
        Endpoint("http://a", "sk-1\nX: 2")
    assert "sk-1" not in str(caught.value)
    assert Endpoint("http://a/v1/", f"{KEY}\n").url == "http://a/v1"
