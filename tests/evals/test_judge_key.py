"""The key of a judge comes from the environment, and is in nothing that is written, logged or raised."""

import json
import logging
import traceback

import pytest

from judge_server import completion, serving
from meap_jax import config
from meap_jax.evals.endpoint import Endpoint
from meap_jax.evals.judge import Judge
from meap_jax.evals.request_log import RequestLog

KEY = "sk-proj-0123456789abcdefghijklmnopqrstuvwxyz"
PARTS = [KEY[i : i + 12] for i in range(len(KEY) - 11)]  # Half a key is too much as well.


def echo(status, before=""):
    """Answers with a status and a body that repeats the Authorization header."""
    return lambda number, body: (status, {"X-Echo": f"Bearer {KEY}"}, f"{before}you sent Authorization: Bearer {KEY}")


ANSWERS = {
    **{f"status {code}": echo(code) for code in (301, 400, 401, 403, 404, 413, 418, 422, 429, 500, 503)},
    "behind the cut": echo(500, " " * 1_950),
    "behind another cut": echo(400, "x" * 270),
    "no completion": echo(200),
    "no completion, behind the cut": echo(200, "x" * 160),
    "a reply": lambda number, body: completion(f"Score: 1\nYour key is {KEY}."),
    "a reply without a score": lambda number, body: completion(f"Your key is {KEY}."),
    "a reply as a key of JSON": lambda number, body: json.dumps({"choices": [{KEY: KEY}]}),
    "no connection": lambda number, body: None,
}


@pytest.mark.parametrize("name", ANSWERS)
def test_no_byte_that_is_written_logged_or_raised_holds_a_part_of_the_key(name, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    said = ""
    with serving(ANSWERS[name]) as server:
        endpoint = Endpoint(server.url, KEY, timeout=5.0)
        judge = Judge(endpoint, "tester", 20, RequestLog(tmp_path / "judge.jsonl"), wait=lambda seconds: None)
        try:
            said += repr(judge.verdicts([("an output", "a reference")] * 2))
        except Exception as error:
            said += traceback.format_exc() + repr(error) + str(error.__dict__)
        assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.requests)
        assert server.requests
    out, err = capfd.readouterr()
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    for place in (said, caplog.text, out, err, written, repr(endpoint), repr(judge)):
        assert not [part for part in PARTS if part in place], place
    assert written


def test_no_field_of_the_config_takes_a_key():
    names = config.flatten(config.base())
    assert not [name for name in names if name.endswith(("key", "token", "secret", "password"))]
    with pytest.raises(config.ConfigError) as error:
        Endpoint(f"http://user:{KEY}@localhost/v1", None)
    assert KEY not in str(error.value)


def test_a_key_that_cannot_be_one_is_not_shown_either():
    with pytest.raises(config.ConfigError, match="OPENAI_API_KEY holds a character") as error:
        Endpoint("http://localhost/v1", f"{KEY} {KEY}")
    assert KEY not in str(error.value)
