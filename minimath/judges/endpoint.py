"""A judge behind an OpenAI-compatible server, by the `openai` SDK.

Its retries, Retry-After and time-outs are used. What it lacks stands here: a bound on the time of a whole round of
questions, and of a try whose bytes come slowly; the end of a round whose server is down; requests without a key; the
form of the verdict (verdict.py); replies that are kept (cache.py).
"""
import asyncio
import json
import os
import random
import ssl
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from minimath.config.schema import JudgeOptions
from minimath.core.credentials import mask, url_fault
from minimath.core.errors import UserError
from minimath.judges.base import Judge, Pair
from minimath.judges.cache import ReplyCache, reply_key
from minimath.judges.rubrics import judge_prompt, load_rubric
from minimath.judges.verdict import FORMS, VOTES, Reply, form_fields, read_reply, vote

RETRIES = 3  # of a request
BREAKER = 16  # questions in a row that failed for good: the rest of the round is not asked
ROUND = 20  # times judge_timeout_s: seconds for all requests of one call
PROBE = "Reply with the letter A."
PROMPTS_FAULT = {"http_400", "http_413", "http_422"}  # says nothing about the next prompt
FORM_REFUSED = {"http_400", "http_422", "http_501", "http_500"}  # the last: llama-cpp-python without logits_all
FAULTS = {"timeout", "unreachable", "garbage", "unreadable", "given_up", "out_of_time"}
PING_HINTS = {"http_404": "check judge_url and judge_model={model!r}",
              "http_401": "set the environment variable {key_env} to a valid key",
              "http_403": "set the environment variable {key_env} to a valid key",
              "unreachable": "start the server or correct judge_url",
              "timeout": "start the server, or raise judge_timeout_s"}
OTHER_HINT = "check that judge_url is an OpenAI-compatible base URL (.../v1)"


class Failure(Exception):
    """A question without a reply: its kind, as counted, and what was met."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


class EndpointJudge(Judge):
    """The judge that asks a server.

    Votes are probabilities where the server has log-probs, which `ping` finds out, else A, B or TIE. counts: requests,
    retries, request_seconds (summed over requests), failed tries by kind (timeout, unreachable, garbage,
    http_<status>), given_up (by the breaker) and out_of_time (of the round), cache_hits, unreadable, soft_votes,
    cut_off (by judge_max_tokens), prompt_tokens and completion_tokens as the server reports them, no_usage (replies
    without that report)."""

    def __init__(self, options: JudgeOptions, *, say: Callable[[str], None] = print, prompt: Callable = judge_prompt,
                 cache: ReplyCache | None = None):
        """Check address, model and rubric. Raises UserError.

        cache: replies of earlier requests; None: none kept."""
        super().__init__(options, say=say)
        self._sdk = import_sdk()
        check_address(options)
        self.name = f"openai:{options.model}"
        self.options, self.prompt, self.cache, self.rubric = options, prompt, cache, load_rubric(options.rubric)
        self.base = options.url.rstrip("/").removesuffix("/chat/completions")
        self.endpoint = f"{self.base}/chat/completions"
        self.retries, self.breaker, self.round_s = RETRIES, BREAKER, ROUND * options.timeout_s
        self.form, self._limit_name, self._temperature = "plain", "max_tokens", {"temperature": 0}
        self._failed_in_a_row = 0
        self._tripped = False  # the breaker opened, and no request has come through since

    def ping(self) -> None:
        """Find the richest form of verdict that the server has. Raises UserError.

        One question in each form, without retries, until one is answered in its form."""
        in_own_loop(self._ping())

    def compare(self, pairs: list[Pair]) -> list[float | None]:
        """Return a vote for each pair, or None.

        None for what has no readable reply within 20 x judge_timeout_s, or after 16 failures in a row."""
        replies = self.replies([self.prompt(self.rubric, pair) for pair in pairs])
        votes = [reply and vote(reply) for reply in replies]
        self.counts["unreadable"] += sum(reply is not None and v is None for reply, v in zip(replies, votes))
        self.counts["soft_votes"] += sum(v is not None and v not in VOTES.values() for v in votes)
        return votes

    def replies(self, prompts: list[str]) -> list[Reply | None]:
        """Return the reply to each prompt, or None."""
        return in_own_loop(self._round(prompts))

    # ---- asking

    async def _ping(self) -> None:
        forms, thinks = list(FORMS), f"raise judge_max_tokens={self.options.max_tokens}, or turn its thinking off"
        async with self._client(retries=0) as client:
            while forms:
                try:
                    reply = await self._request(client, self._body(PROBE, forms[0]), forms[0])
                except Failure as failure:
                    if self._adapts(failure):
                        continue
                    if failure.kind not in FORM_REFUSED or len(forms) == 1:
                        hint = PING_HINTS.get(failure.kind, OTHER_HINT).format(**vars(self.options))
                        raise UserError(f"the judge at {self.endpoint} cannot be used: {failure}; {hint}") from None
                else:
                    if reply.cut and not reply.text.strip():
                        raise UserError(f"the judge at {self.endpoint} thinks longer than it may answer: {thinks}")
                    if reply.serves():
                        self.form, self.soft = forms[0], forms[0] == "logprobs"
                        return
                forms.pop(0)

    def _adapts(self, failure: Failure) -> bool:
        """Learn from a refusal that names a field, and say whether it did.

        Newer models take max_tokens under another name, and no temperature."""
        if failure.kind == "http_400" and "max_completion_tokens" in str(failure) and self._limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"
        elif failure.kind == "http_400" and "temperature" in str(failure) and self._temperature:
            self._temperature = {}
        else:
            return False
        return True

    async def _round(self, prompts: list[str]) -> list[Reply | None]:
        self._failed_in_a_row = min(self._failed_in_a_row, self.breaker - 1)  # half open: one more ends this round too
        deadline, turn = time.monotonic() + self.round_s, asyncio.Semaphore(self.options.concurrency)

        async def one(prompt: str) -> Reply | None:
            async with turn:
                left = deadline - time.monotonic()
                if self._failed_in_a_row >= self.breaker:
                    self.counts["given_up"] += 1
                    return None
                try:
                    return await asyncio.wait_for(self._ask(client, prompt), left)
                except asyncio.TimeoutError:
                    self.counts["out_of_time"] += 1
                    return None

        async with self._client(self.retries) as client:
            return await asyncio.gather(*map(one, prompts))

    async def _ask(self, client, prompt: str) -> Reply | None:
        """Get a reply from the cache or the server; None after the last try."""
        body, form = self._body(prompt, self.form), self.form
        key = reply_key(self.endpoint, body)
        if self.cache and (reply := Reply.loads(self.cache.get(key) or "")):
            self.counts["cache_hits"] += 1
            return reply
        once = client.with_options(max_retries=0)
        try:
            try:
                reply = await self._request(once if self._tripped else client, body, form)
            except Failure as failure:
                if failure.kind != "garbage" or self._tripped or not self.retries:
                    raise
                reply = await self._request(once, body, form)  # a proxy's page, which the SDK takes for an answer
        except Failure as failure:
            self._failed_in_a_row += failure.kind not in PROMPTS_FAULT
            self._tripped |= self._failed_in_a_row >= self.breaker
            return None
        self._failed_in_a_row, self._tripped = 0, False
        if self.cache:
            self.cache.put(key, reply.dumps())
        return reply

    # ---- one request

    def _body(self, prompt: str, form: str) -> dict:
        body = {"messages": [{"role": "user", "content": prompt}], "model": self.options.model, **self._temperature,
                "max_tokens": self.options.max_tokens, **form_fields(form, self.options.max_tokens)}
        body[self._limit_name] = body.pop("max_tokens")
        return body

    async def _request(self, client, body: dict, form: str) -> Reply:
        """Get a reply, after the SDK's retries. Raises Failure."""
        try:
            raw = await client.chat.completions.with_raw_response.create(**body)
        except self._sdk.APIStatusError as error:
            kind, detail = f"http_{error.status_code}", f"HTTP {error.status_code} {error.response.text}"
        except self._sdk.APITimeoutError:
            kind, detail = "timeout", f"no answer in {self.options.timeout_s:g} s"
        except self._sdk.APIConnectionError as error:
            kind, detail = "unreachable", f"{error} {error.__cause__ or ''}"
        else:
            return self._read(self._without_key(raw.http_response.text), form)  # an echo must not reach the cache
        raise Failure(kind, mask(" ".join(self._without_key(detail).split()))[:300])

    def _read(self, text: str, form: str) -> Reply:
        try:
            body = json.loads(text)
            usage = body.get("usage") or {}
            tokens = {name: min(max(0, int(usage.get(name) or 0)), 10 ** 9)
                      for name in ("prompt_tokens", "completion_tokens")}
            reply = read_reply(body["choices"][0], form)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
            self.counts["garbage"] += 1
            raise Failure("garbage", "the reply is not a chat completion in JSON") from None
        self.counts.update(tokens, no_usage=not any(tokens.values()), cut_off=reply.cut and not reply.text)
        return reply

    def _key(self) -> str:
        """Read the key from the environment. Raises UserError."""
        name = self.options.key_env
        key = os.environ.get(name, "").strip() if name else ""
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"judge_key_env={name}: its value has line breaks or unprintable characters")
        return key

    def _without_key(self, text: str) -> str:
        return text.replace(key, "***") if (key := self._key()) else text

    def _client(self, retries: int):
        """Make the SDK's client for one event loop, its tries counted and bounded in time."""
        sdk, counts, timeout_s, key = self._sdk, self.counts, self.options.timeout_s, self._key()

        class Client(sdk.DefaultAsyncHttpxClient):
            async def send(self, request, **options):
                counts.update(requests=1, retries=int(request.headers.get("x-stainless-retry-count", "0") != "0"))
                if not key:
                    request.headers.pop("Authorization", None)
                start = time.monotonic()
                try:  # the SDK's own time-out begins anew with every byte
                    response = await asyncio.wait_for(super().send(request, **options), 2 * timeout_s)
                except asyncio.TimeoutError:
                    counts["timeout"] += 1
                    raise sdk.APITimeoutError(request=request) from None
                except Exception as error:
                    counts["timeout" if "Timeout" in type(error).__name__ else "unreachable"] += 1
                    raise
                finally:
                    counts["request_seconds"] += time.monotonic() - start
                counts.update({f"http_{response.status_code}": 1} if response.status_code >= 300 else {})
                return response

        # a redirect would carry the key to another host, and a proxy can't reach this machine
        here = urllib.parse.urlsplit(self.base).hostname in ("localhost", "127.0.0.1", "::1")
        local = {"trust_env": False, "verify": ssl.create_default_context()} if here else {}
        http = Client(follow_redirects=False, timeout=timeout_s, **local)
        return sdk.AsyncOpenAI(api_key=key or "none", base_url=self.base, timeout=timeout_s, max_retries=retries,
                               http_client=http)


def import_sdk():
    """Import the `openai` package when a judge needs it. Raises UserError."""
    try:
        import openai
    except ImportError:
        raise UserError("judge=openai needs the openai package: pip install 'minimath[judge]'") from None
    return openai


def check_address(options: JudgeOptions) -> None:
    """Raise UserError unless there is a base URL, without a password, and a model."""
    if fault := url_fault(options.url):
        raise UserError(f"judge_url: {fault}")
    parts = urllib.parse.urlsplit(options.url)
    try:
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of the port
        usable = False
    if not usable:
        raise UserError(f"judge_url={mask(options.url)!r}: give the base URL of an OpenAI-compatible server, as "
                        "http://127.0.0.1:8080/v1")
    if not options.model:
        raise UserError("judge=openai needs judge_model=NAME, the model that is asked for at judge_url")


def in_own_loop(coroutine):
    """Run a coroutine in a thread: a notebook has an event loop in this one.

    The SDK draws its pauses from Python's generator, which is the run's: it is set back."""
    state = random.getstate()
    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            return pool.submit(asyncio.run, coroutine).result()
    finally:
        random.setstate(state)


def is_fault(count: str) -> bool:
    """Say whether a count of EndpointJudge is of something that went wrong."""
    return count.startswith("http_") or count in FAULTS
