"""An OpenAI-compatible endpoint: one request for a chat completion, and what can become of it."""

import email.utils
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from meap_jax.errors import ConfigError

_MOST_BYTES = 2**22  # Of an answer; none that is meant for a reader is longer.
_TRANSIENT = (408, 409, 425, 429)  # Besides 5xx.
_ABOUT_THE_MESSAGE = (400, 413, 422)  # Such as a filter's no to one text; any other 4xx is about the setting.


class TransientError(Exception):
    """A request that may succeed when it is made again.

    Attributes:
      retry_after: seconds that the server wants to be left alone for, or None.
    """

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


class RefusedError(Exception):
    """A request that the server refuses for what is in it."""


class Endpoint:
    """Posts messages to `URL/chat/completions`."""

    def __init__(self, url: str, key: str | None, timeout: float = 120.0):
        """Checks the address and the key; asks nothing yet.

        Args:
          url: up to the version, such as https://api.openai.com/v1.
          key: is sent as the bearer's; it is in no message of ours. None: there is no such header.
          timeout: seconds for a connection, for the begin of an answer, and for the rest of it.

        Raises:
          ConfigError: the address is none, or holds what must stay secret; or the key can't stand in a header.
        """
        if not _is_plain_address(url):
            raise ConfigError(
                f"eval.summaries.judge_url is {url.split('?')[0].rpartition('@')[2]!r}, but must be like "
                "http://localhost:8000/v1, without a name, a key or a query in it."
            )
        key = key.strip() if key else None
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError("OPENAI_API_KEY holds a character that no key can have, such as a blank or a newline.")
        self.url, self._key, self._timeout = url.rstrip("/"), key, timeout
        self._opener = urllib.request.build_opener(_NoRedirects)

    def ask(self, body: dict[str, Any]) -> str:
        """The text of the first choice; "" where the model gave none.

        Raises:
          TransientError: 408, 409, 425, 429, 5xx, no answer in time, no connection, or an answer of another form.
          RefusedError: 400, 413 or 422.
          ConfigError: any other status.
        """
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/chat/completions", data, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                return completion_of(self._without_key(_read(response, self._timeout)))
        except urllib.error.HTTPError as error:
            raise self._of_status(error) from None
        except urllib.error.URLError as error:
            raise TransientError(self._safe(error.reason)) from None
        except (OSError, http.client.HTTPException, ValueError) as error:  # TimeoutError is an OSError.
            raise TransientError(self._safe(error) or type(error).__name__) from None

    def _of_status(self, error: urllib.error.HTTPError) -> Exception:
        with error:
            try:
                body = self._without_key(error.read(2_000 + len(self._key or "")))
                said = self._safe(body[:2_000].decode("utf-8", "replace"))  # The cut is through no key.
            except (OSError, http.client.HTTPException):
                said = ""
        # A server may repeat a part of the key that it doesn't like.
        reason = f"status {error.code}" + (f": {said[:300]}" if said and error.code not in (401, 403) else "")
        if error.code in _TRANSIENT or error.code >= 500:
            return TransientError(reason, seconds_of(error.headers.get("Retry-After"), time.time()))
        if error.code in _ABOUT_THE_MESSAGE:
            return RefusedError(reason)
        hint = {401: "OPENAI_API_KEY", 403: "OPENAI_API_KEY", 404: "the address and eval.summaries.judge_model"}
        return ConfigError(
            f"eval.summaries.judge_url is {self.url}, which answers with {reason}; check "
            f"{hint.get(error.code, 'the address and the account')}."
        )

    def _without_key(self, body: bytes) -> bytes:
        """An answer in which the server doesn't repeat the key, before any of it is cut, logged or kept."""
        return body.replace(self._key.encode(), b"(key)") if self._key else body

    def _safe(self, text: object) -> str:
        """A text on one line, without the key."""
        line = " ".join(str(text).split())
        return line.replace(self._key, "(key)") if self._key else line


def _is_plain_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port  # A number, unless it raises.
    except ValueError:
        return False
    is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
    return (
        is_address and parts.username is None and not parts.query and not parts.fragment and not re.search(r"\s", url)
    )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another address; without one, its status is an error."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _read(response: http.client.HTTPResponse, timeout: float) -> bytes:
    """The body; `timeout` of a socket is for each piece of it alone."""
    end, pieces, size = time.monotonic() + timeout, [], 0
    while piece := response.read1(2**16):
        pieces.append(piece)
        size += len(piece)
        if time.monotonic() > end:
            raise TimeoutError("timed out")
        if size > _MOST_BYTES:
            raise ValueError(f"an answer of more than {_MOST_BYTES:,} bytes")
    return b"".join(pieces)


def completion_of(body: bytes) -> str:
    """The text of the first choice of an answer; "" where it is null, as after a filter.

    Raises:
      ValueError: the answer is no chat completion.
    """
    try:
        content = json.loads(body)["choices"][0]["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        begin = " ".join(body[:200].decode("utf-8", "replace").split())
        raise ValueError(f"its answer is no chat completion: {begin!r}") from error
    if content is not None and not isinstance(content, str):
        raise ValueError(f"the content of its answer is no text, but {type(content).__name__}")
    return content or ""


def seconds_of(retry_after: str | None, now: float) -> float | None:
    """Reads a Retry-After header: seconds, or a date (RFC 9110, 10.2.3); None where it is neither.

    Args:
      retry_after: its value.
      now: seconds since 1970.
    """
    if retry_after is None:
        return None
    try:
        return max(0.0, float(int(retry_after)))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - now)
    except (ValueError, OverflowError):
        return None
