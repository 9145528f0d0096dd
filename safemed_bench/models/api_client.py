"""One request of the OpenAI-compatible protocol, tried until it is answered or is known not to be.

Only the standard library: a request is one POST of JSON. What is wrong is told apart by whom it concerns: this request
(RequestError), every request (AccessError, the run stops), or the server for now (IncompleteError, the run stops and
can be resumed). A key is sent in the header, and taken out of everything that the server says.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from ..core.errors import AccessError, IncompleteError, ModelError

if TYPE_CHECKING:
    from ..suite.api import ApiSpec

T = TypeVar("T")
BUSY = (408, 409, 425, 429)
PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the second try, doubled for each further one, and the most of it."""

LONGEST_WAIT = 300.0
"""Seconds that a server may ask to wait (Retry-After); asked for more, the run stops and can be resumed."""

SECRET = 8
"""Characters from which a key can be one; shorter ones are what servers without keys are given."""

SHOWN = 300
"""Characters of a server's complaint that are shown."""


class RequestError(ModelError):
    """This one request gets no answer: its question has no verdict."""


class _AgainError(Exception):
    """Worth another try. after: seconds that the server asks to wait. gone: nobody listens at the address."""

    def __init__(self, message: str, after: float | None = None, *, gone: bool = False) -> None:
        super().__init__(message)
        self.after, self.gone = after, gone


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would take its key to another address."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Client:
    """Asks one server. under_way: entered around each try; may raise where no more requests are allowed.

    Raises ModelError where the key's environment variable is not set.
    """

    def __init__(self, api: ApiSpec, under_way: Callable[[], AbstractContextManager[None]]) -> None:
        self.api, self._under_way = api, under_way
        self._key = _key(api)
        loopback = urlsplit(api.base_url).hostname in ("localhost", "127.0.0.1", "::1")
        proxies = [urllib.request.ProxyHandler({})] if loopback else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)
        self._lock, self._not_before, self._worked = threading.Lock(), 0.0, False

    def ask(self, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """What `read` makes of the reply's JSON; it raises ValueError for a reply of another form, which counts as a
        broken one. Raises RequestError, AccessError or IncompleteError."""
        data = json.dumps(body).encode()
        jitter = random.Random(data)  # its own, so that threads that failed together do not come back together
        for number in range(self.api.retries + 1):
            self._wait()
            try:
                return self._try(data, read)
            except _AgainError as error:
                trouble = error
            if number < self.api.retries:
                self._pause(trouble, min(PAUSE * 2**number, LONGEST_PAUSE) * (0.5 + jitter.random()))
        tries = f"{self.api.retries + 1} tries" if self.api.retries else "1 try"
        if trouble.gone:
            raise IncompleteError(f"the server at {self.api.base_url} cannot be reached, after {tries}: {trouble}")
        raise RequestError(f"no answer after {tries}: {trouble}")

    def _try(self, data: bytes, read: Callable[[Any], T]) -> T:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        request = urllib.request.Request(f"{self.api.base_url}/chat/completions", data, headers, method="POST")
        with self._under_way():
            try:
                with self._opener.open(request, timeout=self.api.timeout) as answer:
                    text = self._clean(answer.read())
            except urllib.error.HTTPError as error:
                with error:
                    raise self._refusal(error.code, error.headers, self._body(error)) from None
            except (OSError, http.client.HTTPException) as error:
                raise self._broken(error) from None
        try:
            found = read(json.loads(text))
        except ValueError as error:  # JSON's own is one
            raise _AgainError(f"its reply is no chat completion ({error}): {text[:80]!r}") from None
        self._worked = True
        return found

    def _body(self, error: urllib.error.HTTPError) -> str:
        try:
            return self._clean(error.read())
        except (OSError, http.client.HTTPException):
            return ""

    def _clean(self, raw: bytes) -> str:
        """Text without the key; one that is shorter than any secret may be a word of an answer, and stays."""
        text = raw.decode("utf-8", "replace")
        return text.replace(self._key, "[key]") if len(self._key) >= SECRET else text

    def _refusal(self, status: int, headers: Message, text: str) -> Exception:
        """What a status other than 200 means."""
        said, code = _complaint(text)
        told, at = f"HTTP {status}{f': {said}' if said else ''}", self.api.base_url
        if 300 <= status < 400:
            where = headers.get("Location", "another address")
            return AccessError(f"the server at {at} sends elsewhere, to {where}: name that address as `base_url`")
        if status == 401:
            held = f"refuses the key in ${self.api.key_env}" if self._key else "wants a key, which `key_env` names"
            return AccessError(f"the server at {at} {held} ({told})")
        if status in (403, 404) and not self._worked:
            what = f"gives no access to '{self.api.model}'" if status == 403 else f"knows no '{self.api.model}'"
            return AccessError(f"the server at {at} {what}, or nothing at this address ({told})")
        if status == 402 or code == "insufficient_quota":
            return IncompleteError(f"the server at {at} takes no more requests on this account ({told})")
        if status in BUSY or status >= 500:
            return self._later(told, _seconds(headers.get("Retry-After")))
        return RequestError(f"the server refuses this request ({told})")

    def _later(self, told: str, after: float | None) -> Exception:
        if after is not None and after > LONGEST_WAIT:
            return IncompleteError(f"the server at {self.api.base_url} asks to wait {after:.0f} seconds ({told})")
        return _AgainError(told, after)

    def _broken(self, error: Exception) -> _AgainError:
        cause = getattr(error, "reason", error)
        words = f"{type(cause).__name__}: {cause}" if isinstance(cause, Exception) else str(cause)
        if isinstance(cause, TimeoutError):
            words = f"nothing within {self.api.timeout:g} seconds"
        return _AgainError(
            self._clean(words.encode()), gone=isinstance(cause, ConnectionRefusedError | socket.gaierror)
        )

    def _wait(self) -> None:
        while (left := self._not_before - time.monotonic()) > 0:
            time.sleep(left)

    def _pause(self, trouble: _AgainError, seconds: float) -> None:
        """A server that says how long to wait means every thread."""
        if trouble.after is None:
            time.sleep(seconds)
            return
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + trouble.after)


def _key(api: ApiSpec) -> str:
    """From the environment, "" where the suite names none. Raises ModelError where it is absent or is no key: one with
    a line feed would be told in an error of the HTTP library."""
    if api.key_env is None:
        return ""
    key = os.environ.get(api.key_env, "").strip()
    if key and key.isascii() and key.isprintable():
        return key
    what = "holds characters that no key has" if key else "is not set"
    raise ModelError(f"the environment variable {api.key_env}, for the key of {api.base_url}, {what}")


def _complaint(text: str) -> tuple[str, str]:
    """Message and code of an error's body, in the protocol's form or in any other."""
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else text
    message = error.get("message", error) if isinstance(error, dict) else error
    code = error.get("code") if isinstance(error, dict) else None
    return " ".join(str(message).split())[:SHOWN], str(code or "")


def _seconds(value: str | None) -> float | None:
    """Retry-After: seconds, or a date (RFC 9110, 10.2.3); None where it says neither."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max((when - datetime.now(UTC)).total_seconds(), 0.0)
