"""What rollouts and a teacher need of a vLLM server, by the `openai` package. Tried with vLLM 0.32."""
import asyncio
import concurrent.futures
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from minimath.core.errors import UserError
from minimath.core.text import mask
from minimath.models.load import first_line
from minimath.rollout.engine import Job
from minimath.rollout.sampling import Sampling

KEY = "VLLM_API_KEY"  # environment variable that holds the server's key
CONNECT_S, ANSWER_S = 30.0, 1200.0  # until a connection stands; until an answer is there, retries included
RETRIES = 3
LOOK_S = 1.0  # the caller is heard at least this often
SETTINGS = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "ignore_eos": True,
            "return_token_ids": True, "add_special_tokens": False}  # of all requests: none is left to the server

Answer = tuple[list[int], list[float], bool]  # ids, logp, finished


def answer_of(where: str, ids, logp, reason: str, max_new_tokens: int, eos: list[int]) -> Answer:
    """Check a completion of vLLM; UserError if it is none to what was asked."""
    fault, logp = "", logp or []
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        fault = "no token ids (return_token_ids); vLLM 0.10.2 or newer gives them"
    elif len(logp) != len(ids) or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in logp):
        fault = f"{len(logp)} log-probs for {len(ids)} tokens, or some that are no numbers; is it a vLLM server?"
    elif len(ids) > max_new_tokens or ids[-1] not in eos and (reason != "length" or len(ids) < max_new_tokens):
        fault = f"a completion cut at {len(ids)} tokens ({reason}); has it a --max-model-len for prompt and completion?"
    if fault:
        raise UserError(f"{where} answered with {fault}")
    return ids, [float(x) for x in logp], ids[-1] in eos


class Client:
    """vLLM's OpenAI-compatible server, asked from an event loop in a thread."""

    def __init__(self, url: str, option: str, key_env: str):
        """Connect. option: the one that gave the URL; key_env: environment variable of the key, if there is one."""
        try:
            import openai
        except ImportError:
            raise UserError(f"{option}= needs the openai package: pip install -e '.[judge]'") from None
        self.model, self.limit, self.openai, self.option = "", None, openai, option
        self.key_env = key_env
        self.where, self.root = f"the server at {option}={mask(url)}", url.rstrip("/").removesuffix("/v1")
        self.key = os.environ.get(key_env, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError(f"the environment variable {key_env} has line breaks or unprintable characters: "
                            "set the key")
        try:
            self.client = openai.AsyncOpenAI(
                base_url=self.root + "/v1", api_key=self.key or "none", max_retries=RETRIES,
                timeout=openai.Timeout(None, connect=CONNECT_S),
                http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, trust_env=False))  # not with our key
        except Exception as error:  # httpx.InvalidURL
            raise UserError(f"{self.where} cannot be used ({first_line(error)}); correct {option}") from None
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def served(self) -> list[dict]:
        """List the models and adapters served."""
        reply = self._ask("/models").result()
        cards = reply.get("data") if isinstance(reply, dict) else None
        return [card for card in cards or [] if isinstance(card, dict)]

    def pick(self, found: list[dict], served: list[dict], otherwise: str, longest: int) -> str:
        """Return the name of the first model found; UserError for none, or one that takes fewer tokens."""
        if not found:
            names = ", ".join(str(card.get("id")) for card in served) or "no model"
            raise UserError(f"{self.where} serves {names}{otherwise}")
        self.limit = found[0].get("max_model_len")  # an adapter's card has none
        self.refuse_longer(longest, "max_prompt_len + max_new_tokens need")
        return found[0]["id"]

    def refuse_longer(self, longest: int, who_needs: str) -> None:
        """Raise UserError where the server takes fewer tokens."""
        if self.limit and self.limit < longest:
            raise UserError(f"{self.where} takes {self.limit} tokens, but {who_needs} {longest}; start it with "
                            f"--max-model-len {longest}")

    def complete_all(self, bodies: list[dict], most: int, read: Callable) -> Iterator[list[tuple[int, object]]]:
        """Yield places of requests, and read(place, choice) of their answers, as they end, `most` in flight.

        [] after LOOK_S without one. One that fails for good ends all others. Raises UserError."""
        room = asyncio.Semaphore(most)
        futures = {self._ask("/completions", {"model": self.model, **SETTINGS, **body}, room): i
                   for i, body in enumerate(bodies)}
        waiting = set(futures)
        try:
            while waiting:
                ended, waiting = concurrent.futures.wait(waiting, LOOK_S, concurrent.futures.FIRST_COMPLETED)
                yield [(i, read(i, self._choice(bodies[i]["prompt"], future.result())))
                       for future in ended for i in [futures[future]]]
        finally:  # after an error or a signal: vLLM aborts what nobody waits for
            for future in waiting:
                future.cancel()

    def _choice(self, prompt: list[int], reply) -> dict:
        choices = reply.get("choices") if isinstance(reply, dict) else []
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise UserError(f"{self.where} did not answer with one choice; is it a vLLM server?")
        if choices[0].get("prompt_token_ids", prompt) not in (prompt, None):
            raise UserError(f"{self.where} changed the prompt's token ids; is its tokenizer that of the model?")
        return choices[0]

    def close(self) -> None:
        """End the thread; a second time does nothing."""
        if self.loop.is_running():
            asyncio.run_coroutine_threadsafe(self.client.close(), self.loop).result()
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()

    def _ask(self, path: str, body: dict | None = None, room=None, *, optional=False) -> concurrent.futures.Future:
        """Start a request on the loop; its future gives the reply, or a UserError.

        optional: None where the server refuses it."""
        async def ask():
            try:
                async with room or asyncio.Semaphore():
                    request = self.client.post(path, body=body, cast_to=object) if body else \
                        self.client.get(path, cast_to=object)
                    return await asyncio.wait_for(request, ANSWER_S)
            except self.openai.APIStatusError as error:
                said = error.body or ""
                if isinstance(said, dict):
                    said = said.get("message") or said.get("detail") or said
                status, said = error.status_code, " ".join(str(said).split())
                if optional or "already been loaded" in said:  # by a try whose answer was lost
                    return None
            except (self.openai.APIConnectionError, asyncio.TimeoutError, ValueError) as error:  # ValueError: no JSON
                status, said = 0, (str(error.__cause__ or "") or str(error) or f"no answer in {ANSWER_S:g} s")
            raise UserError(self._advice(status, said, path))

        return asyncio.run_coroutine_threadsafe(ask(), self.loop)

    def _advice(self, status: int, said: str, path: str) -> str:
        said = f" ({(said.replace(self.key, '***') if self.key else said)[:300]})" if said else ""
        if status == 0:
            return f"{self.where} cannot be used{said}; start it, or correct {self.option}"
        if status in (401, 403):
            return f"{self.where} refuses the key{said}; set the environment variable {self.key_env}"
        if path.endswith("_lora_adapter"):
            return (f"{self.where} cannot load the adapter{said}; start it with --enable-lora, a --max-lora-rank of "
                    "lora_r and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, and let it see the run "
                    "folder (out=) under the same path")
        if status == 404:
            return f"{self.where} does not know {self.model or path}{said}; was it restarted, is it a vLLM server?"
        return f"{self.where} refuses {path}: HTTP {status}{said}"


class Server(Client):
    """A server that completes, with the adapters that it is told to load."""

    def __init__(self, url: str, name: str, longest: int, probe: Job, how: Sampling):
        """Connect; raise UserError for another model, or log-probs of no use to the sampling.

        longest: tokens of prompt and completion."""
        super().__init__(url, "vllm_url", KEY)
        try:
            bases = [card for card in self.served() if not card.get("parent")]
            found = [card for card in bases if name in (card.get("id"), card.get("root"))]
            self.model = self.pick(found or (bases if len(bases) == 1 else []), bases,
                                   f", not {name}; start it with that model", longest)
            if how.temperature and (how.temperature != 1 or not how.full()) and not self._gives_processed(probe):
                raise UserError(f"{self.where} tells log-probs from before temperature and truncation: start it with "
                                "--logprobs-mode processed_logprobs, or use temperature=1 top_p=1 min_p=0 top_k=0")
        except UserError:
            self.close()
            raise

    def _gives_processed(self, probe: Job) -> bool:
        """Tell whether log-probs are those of the distribution sampled from: at top_k=1 they are 0.

        At temperature 2, and of some tokens, so that a peaked distribution is taken for none."""
        parts = self.complete([probe], Sampling(2.0, top_k=1), 8, [], 1)
        return all(abs(x) < 1e-4 for part in parts for _, (_, logp, _) in part for x in logp)

    def complete(self, jobs: list[Job], how: Sampling, max_new_tokens: int, eos: list[int],
                 most: int) -> Iterator[list[tuple[int, Answer]]]:
        """Yield the indices of jobs and their answers as they end, `most` in flight. Raises UserError."""
        settings = {"max_tokens": max_new_tokens, "logprobs": 0, "top_p": how.top_p, "temperature": how.temperature,
                    "min_p": how.min_p, "top_k": how.top_k or -1, "stop_token_ids": eos}
        return self.complete_all(
            [{**settings, "prompt": job.prompt, "seed": job.seed} for job in jobs], most,
            lambda _, choice: answer_of(self.where, choice.get("token_ids"),
                                        (choice.get("logprobs") or {}).get("token_logprobs"),
                                        choice.get("finish_reason"), max_new_tokens, eos))

    def load(self, name: str, folder: Path) -> None:
        """Serve the adapter in a folder, which the server finds under the same path."""
        self._ask("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}).result()
        self.model = name

    def unload(self, name: str) -> None:
        self._ask("/unload_lora_adapter", {"lora_name": name}).result()

    def sleep(self) -> None:
        """Do nothing: a server has its own card."""
