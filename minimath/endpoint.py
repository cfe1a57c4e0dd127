"""A small client for OpenAI-compatible chat endpoints: bounded, retried, counted. Standard library only.

    client = ChatClient("http://127.0.0.1:8080/v1", model="qwen", key_env="OPENAI_API_KEY")
    client.ping()                                # UserError with the reason and the next step
    replies = client.chat_many(prompts)          # list[str | None], None where every try failed

The key is read from the environment variable at each request and sent to the given host alone: redirects are
not followed, and no message of ours contains it. """
from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from .config import UserError

MAX_REPLY_BYTES = 1 << 20
RETRIED_STATUS = {408, 409, 425, 429, 500, 502, 503, 504, 529}
LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host: it is an error instead."""

    def redirect_request(self, *_):
        return None


class _Failure(Exception):
    """One failed try: `kind` for the counters, whether another try makes sense, seconds the server asks to
    wait."""

    def __init__(self, kind: str, detail: str, *, retry: bool, wait_s: float = 0.0):
        super().__init__(detail)
        self.kind, self.retry, self.wait_s = kind, retry, wait_s


@dataclass
class ChatClient:
    """`retries` further tries per request with exponential pauses, jitter, and the server's Retry-After, none
    longer than `timeout_s`; `concurrency` requests in flight. `counts` holds requests, retries, failures by
    kind, and the tokens that the server says it used."""
    url: str
    model: str = ""
    key_env: str = "OPENAI_API_KEY"
    timeout_s: float = 30.0
    retries: int = 3
    concurrency: int = 8
    max_tokens: int = 16
    pause_s: float = 0.5
    counts: Counter = field(default_factory=Counter)

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.url if "//" in self.url else f"//{self.url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"judge_url={self.url!r}: give the base URL of an OpenAI-compatible server, "
                            "for example http://127.0.0.1:8080/v1")
        base = self.url.rstrip("/")
        self.endpoint = base if base.endswith("/chat/completions") else base + "/chat/completions"
        local = [urllib.request.ProxyHandler({})] if parts.hostname in LOCAL_HOSTS else []
        self._opener = urllib.request.build_opener(_NoRedirect, *local)
        self._lock = threading.Lock()
        self._random = random.Random()           # its own: pauses must not move the seed of a run
        self._failed_in_a_row = 0

    def ping(self) -> None:
        """One request, no retry. UserError unless the endpoint answers in the right form."""
        try:
            self._once("Reply with the letter A.")
        except _Failure as failure:
            hints = {"http 401": f"set the environment variable {self.key_env} to a valid key",
                     "http 403": f"set the environment variable {self.key_env} to a valid key",
                     "http 404": f"check judge_url and judge_model={self.model!r}",
                     "unreachable": "start the server or correct judge_url",
                     "timeout": "start the server, or raise judge_timeout_s"}
            hint = hints.get(failure.kind, "check that judge_url is an OpenAI-compatible base URL (.../v1)")
            raise UserError(f"the judge at {self.endpoint} cannot be used: {failure}; {hint}") from None

    def chat_many(self, prompts: list[str]) -> list[str | None]:
        """Replies in the order of the prompts. Never raises for what a server does. Once `concurrency` + 8
        requests in a row have failed for good, the rest of this call is given up: a dead server must not cost
        a run `timeout_s` x `retries` for each prompt."""
        self._failed_in_a_row = 0
        with ThreadPoolExecutor(max_workers=max(1, self.concurrency)) as pool:
            return list(pool.map(self.chat, prompts))

    def chat(self, prompt: str) -> str | None:
        """The reply's text, or None when all tries failed."""
        for attempt in range(self.retries + 1):
            if self._failed_in_a_row >= self.concurrency + 8:
                self._count("given up")
                return None
            try:
                reply = self._once(prompt)
                self._failed_in_a_row = 0
                return reply
            except _Failure as failure:
                self._count(failure.kind)
                if not failure.retry or attempt == self.retries:
                    break
                pause_s = self.pause_s * 2 ** attempt * self._random.uniform(0.5, 1.0)
                time.sleep(min(self.timeout_s, max(pause_s, failure.wait_s)))
                self._count("retries")
        with self._lock:
            self._failed_in_a_row += 1
        return None

    def _count(self, what: str, n: int = 1):
        with self._lock:
            self.counts[what] += n

    def _once(self, prompt: str) -> str:
        self._count("requests")
        messages = [{"role": "user", "content": prompt}]
        body = {"messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        if self.model:
            body["model"] = self.model
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        key = os.environ.get(self.key_env, "").strip() if self.key_env else ""
        if key:
            if not (key.isascii() and key.isprintable()):
                detail = f"the value of {self.key_env} has line breaks or unprintable characters"
                raise _Failure("bad key", detail, retry=False)
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.endpoint, json.dumps(body).encode(), headers, method="POST")
        deadline = time.monotonic() + self.timeout_s
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                raw = _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise _http_failure(error, key, deadline) from None
        except (TimeoutError, OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _Failure("timeout", f"no answer in {self.timeout_s:g} s", retry=True) from None
            raise _Failure("unreachable", f"{type(reason).__name__}: {reason}"[:200], retry=True) from None
        return self._content(raw)

    def _content(self, raw: bytes) -> str:
        try:
            reply = json.loads(raw)
            content = reply["choices"][0]["message"]["content"]
            usage = reply.get("usage") or {}
            for name in ("prompt_tokens", "completion_tokens"):
                self._count(name, int(usage.get(name) or 0))
            if not isinstance(content, str):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise _Failure("garbage", "the reply is not a chat completion in JSON", retry=True) from None
        return content


def _read(response, deadline: float) -> bytes:
    """The body, up to MAX_REPLY_BYTES and the deadline: a server that dribbles bytes must not hold us."""
    chunks, size = [], 0
    while chunk := response.read1(1 << 16):
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_REPLY_BYTES:
            raise http.client.HTTPException("the reply is too long")
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(chunks)


def _http_failure(error: urllib.error.HTTPError, key: str, deadline: float) -> _Failure:
    try:
        detail = " ".join(_read(error, deadline)[:300].decode("utf-8", "replace").split())
    except (OSError, http.client.HTTPException):
        detail = ""
    if key:
        detail = detail.replace(key, "***")      # some servers quote the key that they refuse
    return _Failure(f"http {error.code}", f"HTTP {error.code} {detail}".strip(),
                    retry=error.code in RETRIED_STATUS, wait_s=_retry_after(error.headers.get("Retry-After")))


def _retry_after(value: str | None) -> float:
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
