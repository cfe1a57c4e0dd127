"""A judge behind an OpenAI-compatible server, by the `openai` SDK.

Its retries, Retry-After and time-outs are used; what it lacks stands here, and README.md lists it.
"""
import asyncio
import contextlib
import json
import os
import random
import re
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from minimath.config.schema import JudgeOptions
from minimath.core import interrupt
from minimath.core.errors import UserError
from minimath.core.text import mask
from minimath.judges.base import Judge, Pair
from minimath.judges.cache import ReplyCache, reply_key
from minimath.judges.rubrics import judge_prompt, load_rubric
from minimath.judges.verdict import FIELDS, FORMS, INSTEAD, Reply, read_reply, text_vote, vote

RETRIES = 3  # of a request
BREAKER = 16  # questions in a row that failed for good: the rest of the round is not asked
ROUND = 20  # times judge_timeout_s: seconds for all requests of one call
JSON_TOKENS = 48  # {"verdict": "TIE"} takes 8 to 20, by the spaces that a grammar lets through
SECRET = 8  # characters of a key that is one: x and EMPTY, given to a local server, stand in any reply
PROBE = "Reply with the letter A."
PROMPTS_FAULT = {"http_400", "http_413", "http_422"}  # says nothing about the next prompt
FORM_REFUSED = {"http_400", "http_422", "http_501", "http_500"}  # the last: llama-cpp-python without logits_all
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)  # of a server's JSON
FAULTS = {"timeout", "unreachable", "garbage", "unreadable", "given_up", "out_of_time"}


class Failure(Exception):
    """A question without a reply: its kind, as counted, and what was met."""

    def __init__(self, kind: str, detail: str, wait: float | None = None):
        """wait: seconds after which the server wants to be asked again."""
        super().__init__(detail)
        self.kind, self.wait = kind, wait


class EndpointJudge(Judge):
    """The judge that asks a server.

    Votes are probabilities where the server has log-probs, which `ping` finds out, else A, B or TIE. counts: requests,
    retries, failed tries by kind, questions given_up (by the breaker), out_of_time (of the round), unreadable, cut_off
    (by judge_max_tokens), cache_hits, request_seconds, and the tokens that the server reports."""
    by_rubric = True

    def __init__(self, options: JudgeOptions, *, say: Callable[[str], None] = print, cache: ReplyCache | None = None):
        """Check address and rubric. Raises UserError."""
        super().__init__(options, say=say)
        try:
            parts = urllib.parse.urlsplit(options.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and options.model
        except ValueError:  # of the port
            usable = False
        if not usable:
            raise UserError(f"judge=openai: judge_url={mask(options.url)!r} judge_model={options.model!r}: give "
                            "the base URL of an OpenAI-compatible server, as http://127.0.0.1:8080/v1, and its model")
        try:
            import openai
        except ImportError:
            raise UserError("judge=openai needs the openai package: pip install -e '.[judge]'") from None
        self._sdk = openai
        self.name = f"openai:{options.model}"
        self.options, self.prompt, self.cache, self.rubric = options, judge_prompt, cache, load_rubric(options.rubric)
        self.base = options.url.rstrip("/").removesuffix("/chat/completions")
        self.endpoint = f"{self.base}/chat/completions"
        self.retries, self.breaker, self.round_s = RETRIES, BREAKER, ROUND * options.timeout_s
        self.reply_form, self._failed_in_a_row = "plain", 0
        self.newer_fields = False  # of newer models: the limit of tokens has another name, temperature is refused

    def ping(self) -> None:
        """Find the richest form of verdict that the server has. Raises UserError."""
        in_own_loop(self._ping())

    def compare(self, pairs: list[Pair]) -> list[float | None]:
        """Return a vote for each pair; None for one without a readable reply."""
        replies = in_own_loop(self._round([self.prompt(self.rubric, pair) for pair in pairs]))
        votes = [reply and vote(reply) for reply in replies]
        self.counts["unreadable"] += sum(reply is not None and v is None for reply, v in zip(replies, votes))
        return votes

    async def _ping(self) -> None:
        o, forms, waits = self.options, list(FORMS), self.retries
        async with self._client(retries=0) as client:  # a server that is down is said at once, a busy one waited for
            while forms:
                try:
                    reply = await self._request(client, self._body(PROBE, forms[0]))
                except Failure as failure:
                    if re.search("max_completion_tokens|temperature", str(failure)) and not self.newer_fields:
                        self.newer_fields = True
                        continue
                    if failure.wait is not None and waits:
                        waits -= 1
                        await asyncio.sleep(failure.wait)
                        continue
                    refused = failure.kind in FORM_REFUSED or failure.kind == "http_403" and "logprobs" in str(failure)
                    if not refused or len(forms) == 1:  # 403: "not allowed to request logprobs from this model"
                        raise UserError(
                            f"the judge at {self.endpoint} cannot be used: {failure}; is the server up, judge_url an "
                            f"OpenAI-compatible base URL (.../v1), judge_model={o.model!r} there, a valid key in "
                            f"{o.key_env}, judge_timeout_s={o.timeout_s:g} enough?") from None
                else:
                    if fault := self._unusable(reply, plain=forms[0] == "plain"):
                        raise UserError(f"the judge at {self.endpoint} {fault}")
                    answered = {"logprobs": len(reply.top) > 1, "json_schema": text_vote(reply.text) is not None}
                    if answered.get(forms[0], True):
                        self.reply_form, self.soft = forms[0], forms[0] == "logprobs"
                        return
                forms.pop(0)

    def _unusable(self, reply: Reply, *, plain: bool) -> str:
        """Say why a model that replies so to the probe gives no verdicts; "" if it may."""
        limit = f"judge_max_tokens={self.options.max_tokens}"
        if reply.cut and not reply.text:
            return f"thinks longer than it may answer: raise {limit}, or turn its thinking off"
        if reply.cut and plain and text_vote(reply.text) is None:
            return f"was cut before its verdict ({reply.text[:80]!r} ...): raise {limit}, or turn its thinking off"
        if reply.instead:
            return (f"leaves content empty and answers in {reply.instead}: turn its thinking off, or have the server "
                    "tell thoughts and answer apart (another reasoning parser, or none)")
        return ""

    async def _round(self, prompts: list[str]) -> list[Reply | None]:
        retries = self.retries if self._failed_in_a_row < self.breaker else 0  # of a server that was down, no more
        self._failed_in_a_row = min(self._failed_in_a_row, self.breaker - 1)  # one more failure ends this round too
        deadline, turn = time.monotonic() + self.round_s, asyncio.Semaphore(self.options.concurrency)

        async def one(prompt: str) -> Reply | None:
            async with turn:
                if self._failed_in_a_row >= self.breaker:
                    self.counts["given_up"] += 1
                    return None
                try:
                    return await asyncio.wait_for(self._ask(client, prompt), deadline - time.monotonic())
                except asyncio.TimeoutError:
                    self.counts["out_of_time"] += 1
                    return None

        async with self._client(retries) as client:
            return await asyncio.gather(*map(one, prompts))

    async def _ask(self, client, prompt: str) -> Reply | None:
        body = self._body(prompt, self.reply_form)
        key = reply_key(self.endpoint, body | ({"when": self.when} if self.when else {}))
        if self.cache and (kept := self.cache.get(key)) and vote(reply := Reply(*json.loads(kept))) is not None:
            self.counts["cache_hits"] += 1
            return reply
        try:
            reply = await self._request(client, body)
        except Failure as failure:
            self._failed_in_a_row += failure.kind not in PROMPTS_FAULT
            return None
        self._failed_in_a_row = 0
        if self.cache and vote(reply) is not None:  # else it is asked again
            self.cache.put(key, json.dumps(reply))
        return reply

    def _body(self, prompt: str, form: str) -> dict:
        limit = max(self.options.max_tokens, JSON_TOKENS if form == "json_schema" else 0)
        fields = {"max_completion_tokens": limit} if self.newer_fields else {"max_tokens": limit, "temperature": 0}
        return {"messages": [{"role": "user", "content": prompt}], "model": self.options.model, "stream": False,
                **FIELDS[form], **fields}

    async def _request(self, client, body: dict) -> Reply:
        """Get a reply, after the SDK's retries. Raises Failure."""
        wait = None
        try:
            raw = await client.chat.completions.with_raw_response.create(**body)
        except self._sdk.APIStatusError as error:
            kind, detail = f"http_{error.status_code}", f"HTTP {error.status_code} {error.response.text}"
            wait = retry_after(error.response)
        except self._sdk.APITimeoutError:
            kind, detail = "timeout", f"no answer in {self.options.timeout_s:g} s"
        except self._sdk.APIConnectionError as error:
            kind, detail = "unreachable", f"{error} {error.__cause__ or ''}"
        else:
            reply, tokens = read_completion(self._without_key(raw.http_response.text))  # an echo must not be kept
            self.counts.update(tokens, cut_off=reply.cut and not reply.text)
            return reply
        raise Failure(kind, mask(" ".join(self._without_key(detail).split()))[:300], wait)

    def _key(self) -> str:
        key = os.environ.get(self.options.key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"judge_key_env={self.options.key_env}: the key has line breaks or unprintable characters")
        return key

    def _without_key(self, text: str) -> str:
        key = self._key()
        return text.replace(key, "***") if len(key) >= SECRET else text

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
                if response.status_code >= 300:
                    counts[f"http_{response.status_code}"] += 1
                elif isinstance(status := read_completion(response.text), int):
                    counts["garbage"] += 1
                    text = f"the reply is not a chat completion in JSON: {response.text}"
                    return type(response)(status, request=request, text=text)
                return response

        here = urllib.parse.urlsplit(self.base).hostname in ("localhost", "127.0.0.1", "::1")  # no way for a proxy
        local = {"trust_env": False, "verify": ssl.create_default_context()} if here else {}
        try:  # a redirect would carry the key elsewhere
            return sdk.AsyncOpenAI(api_key=key or "none", base_url=self.base, timeout=timeout_s, max_retries=retries,
                                   http_client=Client(follow_redirects=False, timeout=timeout_s, **local))
        except Exception as error:  # of httpx, which names no class for all
            raise UserError(f"judge_url={mask(self.base)!r}: {mask(str(error))}; correct the address, or the proxy "
                            "(ALL_PROXY, HTTPS_PROXY, HTTP_PROXY) or SSL_CERT_FILE of the environment") from None


def read_completion(text: str) -> tuple[Reply, dict[str, int]] | int:
    """Read a chat completion and the tokens that it reports; of anything else the HTTP status that it stands for.

    That is what an error inside a 200 names, else 502, as of a bad gateway: a proxy's page is asked for again."""
    body = {}
    with contextlib.suppress(*UNREADABLE):
        body = json.loads(text) if text.lstrip().startswith("{") else whole_of_stream(text)
        usage = body.get("usage") or {}
        tokens = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        choice = body["choices"][0]
        if not (body.get("error") or choice.get("error")):
            return read_reply(choice), tokens
    with contextlib.suppress(*UNREADABLE):
        choice = (body.get("choices") or [{}])[0]
        error = next((e for e in (body.get("error"), choice.get("error"), body) if isinstance(e, dict)), {})
        if 400 <= (status := int(error.get("code") or error.get("status"))) < 600:
            return status
    return 502


def whole_of_stream(text: str) -> dict:
    """Join the chunks of a server that streams unasked: the completion that they make."""
    chunks = [json.loads(line[5:]) for line in text.splitlines() if re.match(r"data:(?!\s*\[DONE\])", line)]
    if error := next((chunk["error"] for chunk in chunks if chunk.get("error")), None):
        return {"error": error}
    choices = [choice for chunk in chunks for choice in chunk.get("choices") or [] if not choice.get("index")]
    deltas = [choice.get("delta") or {} for choice in choices]
    said = {name: [delta[name] for delta in deltas if isinstance(delta.get(name), str)]
            for name in ("content", *INSTEAD)}
    logged = [position for choice in choices for position in (choice.get("logprobs") or {}).get("content") or []]
    end = next((choice["finish_reason"] for choice in choices if choice.get("finish_reason")), None)
    return {"usage": next((chunk["usage"] for chunk in chunks[::-1] if chunk.get("usage")), None),
            "choices": [{"message": {name: "".join(parts) for name, parts in said.items() if parts},
                         "finish_reason": end, "logprobs": {"content": logged}}] if choices else []}


def retry_after(response) -> float | None:
    """Read how many seconds a busy server asks for, 60 at most; None for other faults."""
    told = response.headers.get("retry-after")
    if response.status_code != 429 and not (response.status_code == 503 and told):
        return None
    try:
        return min(max(float(told), 0.0), 60.0)
    except (TypeError, ValueError):  # none told, or a date
        return 5.0 if told else 1.0


def in_own_loop(coroutine):
    """Run a coroutine in a thread: a notebook has an event loop in this one. Raises Interrupted.

    The SDK draws its pauses from Python's generator, which is the run's: it is set back."""
    async def until_stopped():
        work = asyncio.ensure_future(coroutine)
        while not (work.done() or left.is_set()):
            interrupt.check()
            await asyncio.wait([work], timeout=interrupt.LOOK_S)
        return work.done() and work.result()

    state, left = random.getstate(), threading.Event()
    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            try:
                return pool.submit(asyncio.run, until_stopped()).result()
            finally:
                left.set()  # by Ctrl-C outside a run: nobody else ends the work
    finally:
        random.setstate(state)


def is_fault(count: str) -> bool:
    return count.startswith("http_") or count in FAULTS
