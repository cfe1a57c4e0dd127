"""A teacher behind vLLM's OpenAI-compatible server, by its prompt_logprobs. Tried with vLLM 0.32 on a CPU."""
import contextlib
import math
from collections.abc import Callable

from minimath.config.rl_options import TeacherOptions
from minimath.core import interrupt
from minimath.core.errors import UserError
from minimath.models.policy import Policy
from minimath.rollout.vllm_client import Client

KEY = "TEACHER_API_KEY"  # environment variable that holds the server's key, which may not be the rollouts' server
IN_FLIGHT = 16  # requests: with prompt_logprobs vLLM holds logits of a whole prompt, and uses no prefix cache
LOWEST = -9999.0  # what vLLM tells in place of -inf, which JSON lacks
PROBE = "Tom's 12 apples cost $3.50.\n\nSo \\(12 \\times 3.5 = \\boxed{42}\\), \u00e9\u4f60\u597d."
ADDED = 100  # of the tokens added to a vocabulary, as many are compared


class TeacherServer(Client):
    """Asks a server for the log-probs of prompts' tokens."""

    def __init__(self, options: TeacherOptions, policy: Policy, say: Callable[[str], None], max_new_tokens: int = 0):
        """Connect; raise UserError for a server without the model, of other tokens or too short for the policy's."""
        super().__init__(options.name, "teacher", KEY)
        try:
            served = self.served()
            bases = [card for card in served if not card.get("parent")]
            otherwise = ": start one that serves the teacher alone"
            self.model = self.pick(bases if len(bases) == 1 else [], served, otherwise,
                                   policy.prompt.max_prompt_len + max_new_tokens + 1)  # it must generate one
            self._refuse_other_tokens(policy.tokenizer, say)
        except UserError:
            self.close()
            raise

    def _refuse_other_tokens(self, tokenizer, say: Callable[[str], None]) -> None:
        added = tokenizer.get_added_vocab()
        text = PROBE + "".join(sorted(added, key=added.get)[:ADDED])
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        reply = self._ask(f"{self.root}/tokenize", {"model": self.model, "prompt": text, "add_special_tokens": False},
                          optional=True).result()
        told = reply.get("tokens") if isinstance(reply, dict) else None
        if not isinstance(told, list):
            say(f"{self.where} does not answer /tokenize: that its tokenizer is the policy's can't be checked")
        elif told != own:
            there, here = next((pair for pair in zip(told, own) if pair[0] != pair[1]), (len(told), len(own)))
            raise other_tokens(self.where, tokenizer.convert_ids_to_tokens(here), there, here)

    def logps(self, rows: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        """Tell log-probs of completions' tokens; rows: ids of prompt and of completion.

        Raises UserError; Interrupted within a second or so of a signal."""
        bodies = [{"prompt": [*prompt, *completion], "max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0,
                   "top_p": 1.0, "min_p": 0.0, "top_k": -1} for prompt, completion in rows]  # vLLM refuses 0 tokens
        longest = max((len(body["prompt"]) for body in bodies), default=0) + 1
        self.refuse_longer(longest, "a prompt (with teacher_system=) and its completion need")
        told: list[list[float]] = [[] for _ in rows]
        parts = self.complete_all(bodies, IN_FLIGHT, lambda i, choice: logp_of(
            self.where, bodies[i]["prompt"], choice.get("prompt_logprobs"), len(rows[i][0])))
        with contextlib.closing(parts):
            for part in parts:
                interrupt.check()
                for i, logp in part:
                    told[i] = logp
        return told


def logp_of(where: str, ids: list[int], told, start: int) -> list[float]:
    """Read the log-probs of ids[start:] off vLLM's prompt_logprobs; UserError if these are not of all ids.

    told: [null, {"<id>": {"logprob": x, ...}}, ...]: the first token has none."""
    fault, logp = "", []
    if not isinstance(told, list):
        fault = "no prompt_logprobs; is it a vLLM server?"
    elif len(told) != len(ids):
        fault = f"{len(told)} log-probs for {len(ids)} tokens; start it with --no-enable-prefix-caching"
    else:
        try:
            logp = [math.nan, *(float(of[str(i)]["logprob"]) for i, of in zip(ids[1:], told[1:]))][start:]
        except (LookupError, TypeError, ValueError):
            fault = "no log-prob of one of the tokens; is its tokenizer the policy's, is it a vLLM server?"
        if not all(x < 1e-3 for x in logp):  # rounding can take one above 0
            fault = "log-probs that are none, or nan; does the teacher's dtype overflow?"
    if fault:
        raise UserError(f"{where} answered with {fault}")
    return [max(x, LOWEST) for x in logp]


def other_tokens(where: str, token: str, there, here) -> UserError:
    return UserError(f"{where} has another tokenizer (token {token!r} is {there} there, {here} here): take a teacher "
                     "of the same family")
