"""A small client for OpenAI-compatible chat endpoints: bounded, retried, counted. Standard library only.

    client = ChatClient("http://127.0.0.1:8080/v1", model="qwen", key_env="OPENAI_API_KEY", form="auto")
    client.ping()                                # says how verdicts are read; UserError with the next step
    replies = client.chat_many(prompts)          # list[str | None], None where every try failed
    votes = client.verdicts(prompts, read)       # list[float | None], the probability of A
    votes = client.choices([(prompt, "ABC")], read)  # list[list[float] | None], the probability of each letter

endpoint_http.py sends one request, endpoint_verdict.py has the forms of a verdict, judge_cache.py keeps replies.
"""
from __future__ import annotations

import json
import random
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from minimath.core.errors import UserError
from minimath.core.credentials import mask, url_fault
from minimath.judges.endpoint_http import Failure, make_opener, post
from minimath.judges.endpoint_verdict import FORMS, Reply, form_fields, is_soft, list_vote, read_reply, vote
from minimath.judges.cache import ReplyCache, cache_folder, reply_key

PROMPTS_FAULT = {"http 400", "http 413", "http 422"}     # says nothing about the next prompt
FORM_REFUSED = {"http 400", "http 422", "http 501"}
PING_REFUSED = FORM_REFUSED | {"http 500"}               # llama-cpp-python without logits_all
FAULTS = {"timeout", "unreachable", "garbage", "too long", "bad key", "unreadable", "given up", "out of time"}
PROBE = "Reply with the letter A."
PING_HINTS = {"http 404": "check judge_url and judge_model={model!r}",
              "http 401": "set the environment variable {key_env} to a valid key",
              "http 403": "set the environment variable {key_env} to a valid key",
              "unreachable": "start the server or correct judge_url",
              "timeout": "start the server, or raise judge_timeout_s"}
OTHER_HINT = "check that judge_url is an OpenAI-compatible base URL (.../v1)"


@dataclass
class ChatClient:
    """`retries` further tries per request, after a pause drawn from [0, pause_s * 2**n] (full jitter) on top of
    the server's Retry-After, at most `timeout_s`; `concurrency` requests in flight.

    `form`: auto, logprobs, json_schema or plain; auto is settled by `ping` and is plain before it. `step_s`:
    seconds for all requests of one `chat_many` or `verdicts`, 0: no limit; what has no answer by then is None.
    `breaker`: after so many requests in a row that failed for good, the rest of that call is not asked; at the next
    call the first failure, without a second try, stops it again. `price_in`, `price_out`: money per million tokens.
    `cache`: replies of earlier requests, None: none kept.

    `counts`: requests, retries, failures by kind, "given up" (breaker), "out of time" (step_s), "cache hits",
    "unreadable" and "soft votes" of verdicts, "cut off" (by max_tokens), prompt_tokens and completion_tokens as the
    server reports them, "no usage" (replies without that report), "request seconds" (summed over requests), cost."""
    url: str
    model: str = ""
    key_env: str = "OPENAI_API_KEY"
    timeout_s: float = 30.0
    retries: int = 3
    concurrency: int = 8
    max_tokens: int = 16
    pause_s: float = 0.5
    counts: Counter = field(default_factory=Counter)
    form: str = "plain"
    step_s: float = 0.0
    breaker: int = 16
    price_in: float = 0.0
    price_out: float = 0.0
    cache: ReplyCache | None = field(default=None, repr=False)

    def __post_init__(self):
        if fault := url_fault(self.url):
            raise UserError(f"judge_url: {fault}")
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"judge_url={mask(self.url)!r}: give the base URL of an OpenAI-compatible server, "
                            "for example http://127.0.0.1:8080/v1")
        base = self.url.rstrip("/")
        self.endpoint = base if base.endswith("/chat/completions") else base + "/chat/completions"
        self._opener = make_opener(parts.hostname)
        self._lock = threading.Lock()
        self._random = random.Random()           # its own: pauses must not move the seed of a run
        self._failed_in_a_row = 0
        self._tripped = False                    # the breaker opened, and no request has come through since
        self._using = "plain" if self.form == "auto" else self.form
        self._limit_name, self._temperature = "max_tokens", {"temperature": 0}

    # ---- asking

    def ping(self) -> str:
        """One request for each form that is tried, richest first, no retry; the first that the server answers in is
        used from then on. Returns that in words. UserError unless the endpoint answers in the right form."""
        forms = list(FORMS) if self.form == "auto" else [self.form]
        while forms:
            try:
                reply = self._once(self._body(PROBE, forms[0]), forms[0], self.timeout_s)
            except Failure as failure:
                if self._adapts(failure):
                    continue
                if failure.kind not in PING_REFUSED or len(forms) == 1:
                    hint = PING_HINTS.get(failure.kind, OTHER_HINT).format(model=self.model, key_env=self.key_env)
                    raise UserError(f"the judge at {self.endpoint} cannot be used: {failure}; {hint}") from None
            else:
                if reply.cut and not reply.text.strip():
                    raise UserError(f"the judge at {self.endpoint} thinks longer than it may answer: raise "
                                    f"judge_max_tokens={self.max_tokens}, or turn its thinking off")
                if reply.serves():
                    self._using = forms[0]
                    return f"verdicts by {self._using}"
            forms.pop(0)
        raise UserError(f"the judge at {self.endpoint} answers without {self.form}; use judge_verdict=auto")

    def chat_many(self, prompts: list[str]) -> list[str | None]:
        """Replies in the order of the prompts. Never raises for what a server does; bounded by `step_s` and
        `breaker`: a dead server must not cost a run `timeout_s` x `retries` for each prompt."""
        return self._all(lambda prompt, deadline: self._text(prompt, deadline), prompts)

    def verdicts(self, prompts: list[str], read: Callable[[str], float | None]) -> list[float | None]:
        """The probability that A is better, for each prompt, or None. `read` turns a text into 1.0, 0.0, 0.5 or None;
        bounds as in chat_many."""
        def ask(prompt, deadline):
            return self._verdict(prompt, "AB", lambda reply: vote(reply, read), deadline)

        return self._all(ask, prompts)

    def choices(self, questions: list[tuple[str, str]],
                read: Callable[[str, str], str | None]) -> list[list[float] | None]:
        """The probability of each letter, for each (prompt, letters), or None. `read` turns a text and its letters into
        a letter, "TIE" or None; bounds as in chat_many."""
        def ask(question, deadline):
            prompt, letters = question
            return self._verdict(prompt, letters, lambda reply: list_vote(reply, letters, read), deadline)

        return self._all(ask, questions)

    def chat(self, prompt: str) -> str | None:
        """The reply's text, or None when all tries failed."""
        return self._text(prompt, float("inf"))

    def _all(self, ask, prompts: list) -> list:
        with self._lock:                         # half open: one failure more and this call is over too
            self._failed_in_a_row = min(self._failed_in_a_row, self.breaker - 1)
        deadline = time.monotonic() + self.step_s if self.step_s else float("inf")
        with ThreadPoolExecutor(max_workers=max(1, self.concurrency)) as pool:
            return list(pool.map(lambda prompt: ask(prompt, deadline), prompts))

    def _text(self, prompt: str, deadline: float) -> str | None:
        reply, _ = self._ask(prompt, "plain", deadline)
        return reply and reply.text

    def _verdict(self, prompt: str, letters: str, vote_of: Callable[[Reply], float | list[float] | None],
                 deadline: float) -> float | list[float] | None:
        form = self._using
        reply, kind = self._ask(prompt, form, deadline, letters)
        if kind in FORM_REFUSED and form != "plain":
            reply, _ = self._ask(prompt, "plain", deadline)
            with self._lock:                     # plain went through: it was the form, not the prompt
                if reply and self._using == form and self.form == "auto":
                    self._using = FORMS[FORMS.index(form) + 1]
        if reply is None:
            return None
        chance = vote_of(reply)
        if chance is None:
            self._count("unreadable")
        elif is_soft(chance):
            self._count("soft votes")
        return chance

    def _ask(self, prompt: str, form: str, deadline: float, letters: str = "AB") -> tuple[Reply | None, str]:
        """(reply, "") from the cache or the server, or (None, kind of the last failure)."""
        body, kind = self._body(prompt, form, letters), ""
        key = reply_key(self.endpoint, body) if self.cache else ""
        kept = self.cache and self.cache.get(key)
        if kept and (reply := Reply.loads(kept)):
            self._count("cache hits")
            return reply, ""
        for attempt in range(self.retries + 1):
            left = deadline - time.monotonic()
            if left <= 0 or self._failed_in_a_row >= self.breaker:
                self._count("out of time" if left <= 0 else "given up")
                return None, kind
            if attempt:
                self._count("retries")
            try:
                reply = self._once(body, form, min(self.timeout_s, left))
                self._failed_in_a_row, self._tripped = 0, False
                if self.cache:
                    self.cache.put(key, reply.dumps())
                return reply, ""
            except Failure as failure:
                kind = failure.kind
                self._count(kind)
                if not failure.retry or attempt == self.retries or self._tripped:
                    break
                pause_s = failure.wait_s + self._random.uniform(0.0, self.pause_s * 2 ** attempt)
                time.sleep(min(self.timeout_s, pause_s, max(0.0, deadline - time.monotonic())))
        with self._lock:
            self._failed_in_a_row += kind not in PROMPTS_FAULT
            self._tripped |= self._failed_in_a_row >= self.breaker
        return None, kind

    def _count(self, what: str, n: float = 1):
        with self._lock:
            self.counts[what] += n

    # ---- one request

    def _body(self, prompt: str, form: str, letters: str = "AB") -> dict:
        body = {"messages": [{"role": "user", "content": prompt}], **self._temperature, "max_tokens": self.max_tokens}
        body |= form_fields(form, self.max_tokens, letters) | ({"model": self.model} if self.model else {})
        body[self._limit_name] = body.pop("max_tokens")
        return body

    def _adapts(self, failure: Failure) -> bool:
        """Whether a refusal named a field that newer OpenAI models take under another name, or not at all, and the
        next request goes without it."""
        if failure.kind != "http 400":
            return False
        if "max_completion_tokens" in str(failure) and self._limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"
        elif "temperature" in str(failure) and self._temperature:
            self._temperature = {}
        else:
            return False
        return True

    def _once(self, body: dict, form: str, timeout_s: float) -> Reply:
        self._count("requests")
        start = time.monotonic()
        try:
            raw = post(self._opener, self.endpoint, body, key_env=self.key_env, timeout_s=timeout_s)
        finally:
            self._count("request seconds", time.monotonic() - start)
        return self._read_body(raw, form)

    def _read_body(self, raw: bytes, form: str) -> Reply:
        try:
            body = json.loads(raw)
            self._pay(body.get("usage") or {})
            reply = read_reply(body["choices"][0], form)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
            raise Failure("garbage", "the reply is not a chat completion in JSON", retry=True) from None
        if reply.cut and not reply.text:
            self._count("cut off")
        return reply

    def _pay(self, usage: dict) -> None:
        tokens = {name: min(max(0, int(usage.get(name) or 0)), 10 ** 9)
                  for name in ("prompt_tokens", "completion_tokens")}
        for name, price in (("prompt_tokens", self.price_in), ("completion_tokens", self.price_out)):
            self._count(name, tokens[name])
            if price:
                self._count("cost", tokens[name] * price / 1e6)
        if not any(tokens.values()):
            self._count("no usage")


def is_fault(count: str) -> bool:
    """Whether a count of ChatClient is of something that went wrong."""
    return count.startswith("http ") or count in FAULTS


def client_for(cfg) -> ChatClient:
    """The client that the judge_* options name, with its cache open. Raises UserError."""
    folder = cache_folder(cfg.judge_cache)
    client = ChatClient(cfg.judge.url, cfg.judge.model, key_env=cfg.judge.key_env, timeout_s=cfg.judge.timeout_s,
                        retries=cfg.judge_retries, concurrency=cfg.judge.concurrency, max_tokens=cfg.judge.max_tokens,
                        form=cfg.judge_verdict, step_s=cfg.judge_step_s, breaker=cfg.judge_breaker,
                        price_in=cfg.judge_price_in, price_out=cfg.judge_price_out)
    client.cache = ReplyCache(folder) if folder else None
    return client
