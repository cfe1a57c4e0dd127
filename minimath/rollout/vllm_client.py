"""What rollout_vllm.py needs of a vLLM server: completions of token ids, and adapters loaded while it runs.

Written after vLLM's documentation, and tried against vLLM 0.32. Standard library only; many threads may call.
"""
import contextlib
import http.client
import json
import math
import os
import socket
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from minimath.core.errors import UserError
from minimath.judges.endpoint_http import RETRIED_STATUS
from minimath.rollout.engine import Completion
from minimath.rollout.sampling import Sampling

CONNECT_S = 30.0  # until a connection stands; an answer may take vllm_timeout_s
MAX_BYTES_PER_TOKEN = 2000  # of a reply


class Job(NamedTuple):
    """One completion to sample."""
    prompt: list[int]
    seed: int


def completion_of(where: str, ids, logp, reason: str, max_new_tokens: int, eos: list[int]) -> Completion:
    """What vLLM answered, as a Completion; UserError if it is no answer to what was asked."""
    fault, logp = "", logp or []
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        fault = "no token ids (return_token_ids); vLLM 0.10.2 or newer gives them"
    elif len(logp) != len(ids) or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in logp):
        fault = f"{len(logp)} log-probs for {len(ids)} tokens, or some that are no numbers; is it a vLLM server?"
    elif len(ids) > max_new_tokens:
        fault = f"{len(ids)} tokens where {max_new_tokens} were asked for; is it a vLLM server?"
    elif ids[-1] not in eos and (reason != "length" or len(ids) < max_new_tokens):
        fault = f"a completion cut at {len(ids)} tokens ({reason}); has it a --max-model-len for prompt and completion?"
    if fault:
        raise UserError(f"{where} answered with {fault}")
    return Completion(ids, [float(x) for x in logp], ids[-1] in eos)


class _Failure(Exception):
    """A request that failed: HTTP status (0: no answer), what the server said, whether another try makes sense."""

    def __init__(self, status: int, detail: str, retry: bool = False):
        super().__init__(detail)
        self.status, self.retry = status, retry


class Server:
    """vLLM's OpenAI-compatible server: /v1/completions with token ids, and LoRA adapters loaded by path."""
    retries, pause_s = 3, 1.0  # the pause doubles each time

    def __init__(self, cfg, longest: int, probe: list[int]):
        try:
            url = urllib.parse.urlsplit(cfg.engine.vllm_url)
            self.address = (url.hostname or "", url.port)
        except ValueError:  # a port that is no number
            self.address = ("", None)
        if not self.address[0] or url.scheme not in ("http", "https") or url.username:
            raise UserError("vllm_url: give the base URL of a vLLM server, for example http://127.0.0.1:8000/v1 (a key "
                            "goes into the environment variable named by vllm_key_env)")
        self.https, self.prefix = url.scheme == "https", url.path.rstrip("/").removesuffix("/v1")
        self.where = f"the server at vllm_url={cfg.engine.vllm_url}"
        self.key_env, self.timeout_s = cfg.vllm_key_env, cfg.vllm_timeout_s
        self.key = os.environ.get(self.key_env, "").strip() if self.key_env else ""
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError(f"the value of the environment variable {self.key_env} has line breaks or unprintable "
                            "characters; set it to the server's key")
        self.open, self.lock, self.stopped = set(), threading.Lock(), threading.Event()
        self.model = ""
        self.base = self.model = self._base_model(cfg, longest)
        self.processed = self._gives_processed(probe)

    def _base_model(self, cfg, longest: int) -> str:
        wanted = cfg.vllm_model or cfg.model.name
        served = self._ask("GET", "/v1/models").get("data") or []
        bases = [m for m in served if isinstance(m, dict) and not m.get("parent")]
        found = [m for m in bases if wanted in (m.get("id"), m.get("root"))]
        if not found:
            names = ", ".join(str(m.get("id")) for m in bases) or "no model"
            raise UserError(f"{self.where} serves {names}, not {wanted}; start it with that model, or give the name "
                            "that the same model has there as vllm_model=")
        limit = found[0].get("max_model_len")
        if limit and limit < longest:
            raise UserError(f"{self.where} takes {limit} tokens, but max_prompt_len + max_new_tokens is {longest}; "
                            f"start it with --max-model-len {longest}")
        return found[0]["id"]

    def _gives_processed(self, probe: list[int]) -> bool:
        """Whether log-probs are those of the distribution sampled from: at top_k=1 there is one token, with log-prob 0.

        At temperature 2, so that few distributions are so peaked that this is no sign; some tokens, for the others.
        """
        [(_, completion)] = self.complete([Job(probe, 0)], Sampling(2.0, top_k=1), 8, [], 1)
        return all(abs(logp) < 1e-4 for logp in completion.logp)

    def complete(self, jobs: list[Job], how: Sampling, max_new_tokens: int, eos: list[int], most: int):
        """Yield (index of the job, Completion) as they end. One that fails for good ends all others."""
        pool = ThreadPoolExecutor(max_workers=max(1, min(most, len(jobs))))
        try:
            futures = {pool.submit(self._complete, job, how, max_new_tokens, eos): i for i, job in enumerate(jobs)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            self._stop()  # after an error or Ctrl-C others may still wait for their answers
            pool.shutdown(cancel_futures=True)
            self.stopped.clear()

    def _complete(self, job: Job, how: Sampling, max_new_tokens: int, eos: list[int]) -> Completion:
        asked = {"model": self.model, "prompt": job.prompt, "n": 1, "max_tokens": max_new_tokens, "seed": job.seed,
                 "temperature": how.temperature, "top_p": how.top_p, "min_p": how.min_p, "top_k": how.top_k or -1,
                 "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,  # else the model's own
                 "stop_token_ids": eos, "ignore_eos": True,  # no others than ours
                 "logprobs": 0, "return_token_ids": True, "add_special_tokens": False}
        reply = self._ask("POST", "/v1/completions", asked, limit=MAX_BYTES_PER_TOKEN * (max_new_tokens + 100))
        choices = reply.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise UserError(f"{self.where} answered with {len(choices or [])} choices where one was asked for")
        choice = choices[0]
        if choice.get("prompt_token_ids", job.prompt) not in (job.prompt, None):
            raise UserError(f"{self.where} changed the prompt's token ids; is its tokenizer that of the model?")
        return completion_of(self.where, choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs"),
                             choice.get("finish_reason"), max_new_tokens, eos)

    def load(self, name: str, number: int, folder: Path) -> None:
        self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        self.model = name

    def unload(self, name: str, number: int) -> None:
        self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        self.model = self.base if self.model == name else self.model

    def sleep(self) -> None:
        """A server has its own card."""

    def close(self) -> None:
        self._stop()

    def _stop(self) -> None:
        """End the requests in flight: vLLM aborts what nobody waits for."""
        with self.lock:
            self.stopped.set()
            for connection in self.open:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def _ask(self, method: str, path: str, body: dict | None = None, *, limit: int = 1 << 20) -> dict:
        """The reply to one request, tried again where that can help. UserError says what to do."""
        for attempt in range(self.retries + 1):
            try:
                raw = self._once(method, path, body, limit)
                break
            except _Failure as failure:
                if attempt and "already been loaded" in str(failure):
                    break  # by a try whose answer was lost
                if not failure.retry or attempt == self.retries or self.stopped.is_set():
                    raise UserError(self._advice(failure, path)) from None
            self.stopped.wait(self.pause_s * 2 ** attempt)
        if path.endswith("_lora_adapter"):
            return {}  # plain text
        try:
            reply = json.loads(raw)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise UserError(f"{self.where} answered {path} with something else than JSON; is it a vLLM server?")
        return reply

    def _once(self, method: str, path: str, body: dict | None, limit: int) -> bytes:
        kind = http.client.HTTPSConnection if self.https else http.client.HTTPConnection
        connection = kind(*self.address, timeout=min(CONNECT_S, self.timeout_s))  # follows no redirect with our key
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        with self.lock:
            self.open.add(connection)
        try:
            connection.connect()
            connection.sock.settimeout(self.timeout_s)
            if self.stopped.is_set():
                raise _Failure(0, "stopped")
            connection.request(method, self.prefix + path, body and json.dumps(body).encode(), headers)
            response = connection.getresponse()
            raw = response.read(limit + 1)
        except TimeoutError:  # not tried again: the next would wait as long
            raise _Failure(0, "no answer in time") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Failure(0, f"{type(error).__name__}: {error}"[:200], retry=True) from None
        finally:
            with self.lock:
                self.open.discard(connection)
            connection.close()
        if response.status != 200:
            detail = error_message(raw)
            raise _Failure(response.status, detail.replace(self.key, "***") if self.key else detail,
                           retry=response.status in RETRIED_STATUS)
        if len(raw) > limit:
            raise _Failure(0, f"a reply of more than {limit} bytes")
        return raw

    def _advice(self, failure: _Failure, path: str) -> str:
        said = f" ({failure})" if str(failure) else ""
        if failure.status == 0:
            return f"{self.where} cannot be used{said}; start it, correct vllm_url, or raise vllm_timeout_s"
        if failure.status in (401, 403):
            return f"{self.where} refuses the key{said}; set the environment variable named by vllm_key_env"
        if path.endswith("_lora_adapter"):
            if failure.status == 404 and "adapter" not in str(failure).lower():
                return (f"{self.where} loads no adapters at run time{said}; start it with --enable-lora and "
                        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment")
            return (f"{self.where} cannot load the adapter{said}; it needs --enable-lora, --max-lora-rank of lora_r or "
                    "more, and the adapter's folder under the same path (vllm_adapter_dir)")
        if failure.status == 404:
            return f"{self.where} does not know {self.model or path}{said}; was it restarted, is it a vLLM server?"
        return f"{self.where} refuses {path}: HTTP {failure.status}{said}"


def error_message(raw: bytes) -> str:
    """What a server's error reply says, on one line."""
    text = raw[:4000].decode("utf-8", "replace")
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        reply = json.loads(raw)
        error = reply.get("error") or reply.get("detail") or text
        text = str(error.get("message") if isinstance(error, dict) else error)
    return " ".join(text.split())[:300]
