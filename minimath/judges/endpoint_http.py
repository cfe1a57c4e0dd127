"""One JSON request to an HTTP endpoint within a deadline. Standard library only.

The key is read from the environment variable at each request and sent to the given host alone: redirects are
not followed, and no message of ours contains it. """
from __future__ import annotations

import email.utils
import functools
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request

MAX_REPLY_BYTES = 1 << 20
RETRIED_STATUS = {408, 409, 425, 429, 500, 502, 503, 504, 529}
LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}


class Failure(Exception):
    """One failed try: `kind` for the counters, whether another try makes sense, seconds the server asks to
    wait."""

    def __init__(self, kind: str, detail: str, *, retry: bool, wait_s: float = 0.0):
        super().__init__(detail)
        self.kind, self.retry, self.wait_s = kind, retry, wait_s


class TooLong(http.client.HTTPException):
    """A reply beyond MAX_REPLY_BYTES."""


def make_opener(host: str) -> urllib.request.OpenerDirector:
    """For `post`. Requests to this machine go around any proxy."""
    local = [urllib.request.ProxyHandler({})] if host in LOCAL_HOSTS else []
    return urllib.request.build_opener(_NoRedirect, _Http, _Https, *local)


def post(opener: urllib.request.OpenerDirector, url: str, body: dict, *, key_env: str, timeout_s: float) -> bytes:
    """The reply's body, at most 1 MiB. Raises Failure. The key is the value of the environment variable key_env."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    key = os.environ.get(key_env, "").strip() if key_env else ""
    if key:
        if not (key.isascii() and key.isprintable()):
            detail = f"the value of {key_env} has line breaks or unprintable characters"
            raise Failure("bad key", detail, retry=False)
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    try:
        with opener.open(request, timeout=timeout_s) as response:
            raw = _read(response)
        return raw.replace(key.encode(), b"***") if key else raw  # an echo must not reach the cache
    except urllib.error.HTTPError as error:
        with error:
            raise _http_failure(error, key) from None
    except TooLong:
        raise Failure("too long", f"a reply of more than {MAX_REPLY_BYTES:,} bytes", retry=False) from None
    # ValueError and OverflowError: of host names and ports that can't be
    except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise Failure("timeout", f"no answer in {timeout_s:g} s", retry=True) from None
        raise Failure("unreachable", f"{type(reason).__name__}: {reason}"[:200], retry=True) from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host: it is an error instead."""

    def redirect_request(self, *_):
        return None


class _TimedReader(io.RawIOBase):
    """Reads of a socket until a deadline: the socket's own time-out starts anew with each byte that arrives, and a
    server that dribbles must not hold us."""

    def __init__(self, raw, sock, deadline: float):
        self.raw, self.sock, self.deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer):
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)
        return self.raw.readinto(buffer)

    def close(self):
        self.raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    def __init__(self, sock, *args, deadline: float, **kwargs):
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_TimedReader(self.fp.detach(), sock, deadline))


def _timed(connection_class):
    """Makes connections of that class whose `timeout` holds from their making to the last byte of the reply."""
    def make(host, *, timeout, **kwargs):
        connection = connection_class(host, timeout=timeout, **kwargs)
        connection.response_class = functools.partial(_TimedResponse, deadline=time.monotonic() + timeout)
        return connection
    return make


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(_timed(http.client.HTTPConnection), request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(_timed(http.client.HTTPSConnection), request, context=self._context)


def _read(response) -> bytes:
    """The body, up to MAX_REPLY_BYTES."""
    chunks, size = [], 0
    while chunk := response.read1(1 << 16):
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_REPLY_BYTES:
            raise TooLong
    return b"".join(chunks)


def _http_failure(error: urllib.error.HTTPError, key: str) -> Failure:
    try:
        detail = " ".join(_read(error)[:300].decode("utf-8", "replace").split())
    except (OSError, http.client.HTTPException):
        detail = ""
    if key:
        detail = detail.replace(key, "***")      # some servers quote the key that they refuse
    return Failure(f"http {error.code}", f"HTTP {error.code} {detail}".strip(),
                    retry=error.code in RETRIED_STATUS, wait_s=retry_after(error.headers.get("Retry-After")))


def retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header: a number or an HTTP date; 0.0 when absent or unreadable."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
