"""Pairwise AI judges, and the win probabilities of the right candidates of a group.

A judge is asked "is the first one better?" and answers with a probability, or None for no vote. Both orders
are asked of every pair, by `judge_groups` and never by a judge itself: p_ij = (v(i, j) + 1 - v(j, i)) / 2, so
that a judge that likes position A whatever stands there says 1/2. Three judges: `rules_judge`
(deterministic), `self_judge` (the training model with its adapter off), `openai_judge` (an OpenAI-compatible
endpoint).

A candidate is text of the policy in training, which is paid for being liked: it is shown up to its final
answer, with control characters, special tokens and role marks defused, capped in length, between marks that
it can't know. """
from __future__ import annotations

import hashlib
import re
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from .answer import answer_end
from .config import UserError
from .endpoint import ChatClient
from .kernels import linear_logp
from .model import adapter_off, base_causal_lm, head, hidden_states, inference
from .steps import StepCount

RUBRIC = Path(__file__).parent / "rubric.txt"
VERDICTS = {"A": 1.0, "B": 0.0, "TIE": 0.5}


class Candidate(NamedTuple):
    """One completion: its text, whether its answer is right, its checked steps, its length in tokens."""
    text: str
    right: bool
    steps: StepCount
    tokens: int


class Pair(NamedTuple):
    """One question to a judge: is `first` the better solution?"""
    problem: str
    first: Candidate
    second: Candidate


@dataclass
class Judge:
    """compare(pairs) -> one probability in [0, 1] that `first` is better, or None (no vote), per pair. ping()
    raises UserError when the judge can't be used; it is called before any long work. `counts`: what it cost
    so far."""
    name: str
    compare: Callable[[list[Pair]], list[float | None]]
    ping: Callable[[], None] = lambda: None
    counts: dict = field(default_factory=dict)


def make_judge(cfg, model=None, tokenizer=None) -> Judge:
    """The judge that cfg.judge names: rules, self (needs model and tokenizer), openai."""
    if cfg.judge == "rules":
        return rules_judge()
    if cfg.judge == "self":
        return self_judge(model, tokenizer, max_chars=cfg.judge_max_chars, micro_tokens=cfg.micro_tokens)
    if cfg.judge == "openai":
        return openai_judge(cfg.judge_url, cfg.judge_model, key_env=cfg.judge_key_env,
                            timeout_s=cfg.judge_timeout_s, retries=cfg.judge_retries,
                            concurrency=cfg.judge_concurrency, max_chars=cfg.judge_max_chars)
    raise UserError(f"judge={cfg.judge!r}: use self, openai or rules")


# ---------------------------------------------------------------- prompts

_SPECIAL = re.compile(r"<(?=[^\s\d=<>-])")                    # <|im_end|>, </s>, <think>, <start_of_turn>
_BRACKETS = re.compile(r"\[(?=/?(?:INST|SYS|AVAILABLE|TOOL|IMG|BOS|EOS)\b)", re.I)
_ROLE = re.compile(r"^([ \t>#*]{0,9}(?:system|user|human|assistant|judge|verdict|instructions?)[ \t*]{0,9}):",
                   re.I | re.M)
_HIDDEN = ("Cc", "Cf", "Co", "Cs", "Cn")     # Unicode categories: control, format, private, surrogate, none


def clean(text: str, max_chars: int, specials: list[str] = ()) -> str:
    """Candidate text as a judge may see it: up to the final answer, without control, format and private
    characters, special tokens broken by a space, role marks at line starts without their colon, the middle
    cut beyond max_chars."""
    text = text[:answer_end(text)]
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in _HIDDEN)
    for special in specials:
        text = text.replace(special, f"{special[:1]} {special[1:]}")
    text = _ROLE.sub(r"\1 -", _BRACKETS.sub("[ ", _SPECIAL.sub("< ", text))).strip()
    if len(text) > max_chars:
        tail = max_chars // 3
        text = f"{text[:max_chars - tail]}\n[cut]\n{text[len(text) - tail:]}"
    return text


def load_rubric(path: str | Path = RUBRIC) -> str:
    """The judge's instructions: a text file with {problem}, {first}, {second} and {nonce}."""
    try:
        rubric = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"rubric {path}: {error}; give a readable text file") from None
    missing = [name for name in ("{problem}", "{first}", "{second}", "{nonce}") if name not in rubric]
    if missing:
        raise UserError(f"rubric {path}: {', '.join(missing)} not found in it; "
                        "all of {problem}, {first}, {second} and {nonce} must stand in a rubric")
    return rubric


def judge_prompt(rubric: str, pair: Pair, max_chars: int, specials: list[str] = ()) -> str:
    """The rubric with its places filled in one pass. The nonce is a hash of the texts, the same for both
    orders: a candidate would have to contain the hash of itself to forge a mark, and a run stays
    reproducible."""
    shown = {"problem": pair.problem, "first": pair.first.text, "second": pair.second.text}
    parts = {name: clean(text, max_chars, specials) for name, text in shown.items()}
    texts = "\x00".join([parts["problem"], *sorted((parts["first"], parts["second"]))])
    parts["nonce"] = hashlib.sha256(texts.encode("utf-8", "replace")).hexdigest()[:12]
    return re.sub(r"\{(problem|first|second|nonce)\}", lambda match: parts[match.group(1)], rubric)


# ---------------------------------------------------------------- the three judges

def rules_judge() -> Judge:
    """Deterministic and offline: a right answer beats a wrong one; then the higher share of right steps (no
    checkable step counts as 0); then fewer tokens; then a tie."""
    def merit(candidate: Candidate):
        share = candidate.steps.right / candidate.steps.total if candidate.steps.total else 0.0
        return candidate.right, share, -candidate.tokens

    def compare(pairs: list[Pair]) -> list[float | None]:
        return [0.5 if merit(a) == merit(b) else float(merit(a) > merit(b)) for _, a, b in pairs]

    return Judge("rules", compare)


def self_judge(model, tokenizer, *, rubric: str | Path = RUBRIC, max_chars: int = 4000,
               micro_tokens: int = 4096) -> Judge:
    """The model itself, adapter off, in eval mode: P(A) / (P(A) + P(B)) of the first token of its reply, from
    `linear_logp` on the last hidden state of each prompt. No text is generated or parsed. micro_tokens bounds
    the padded tokens of one forward; prompts longer than the model's context get no vote."""
    rubric = load_rubric(rubric)
    letters = letter_ids(tokenizer)
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    config = base_causal_lm(model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or 1 << 30
    counts = {"prompts": 0, "prompt_tokens": 0, "too_long": 0}

    def compare(pairs: list[Pair]) -> list[float | None]:
        prompts = [_chat_ids(tokenizer, judge_prompt(rubric, pair, max_chars, specials)) for pair in pairs]
        votes: list[float | None] = [None] * len(pairs)
        fitting = [i for i, ids in enumerate(prompts) if len(ids) <= limit]
        counts["prompts"] += len(pairs)
        counts["prompt_tokens"] += sum(map(len, prompts))
        counts["too_long"] += len(pairs) - len(fitting)
        with inference(model), adapter_off(model):
            for rows in _batches(sorted(fitting, key=lambda i: len(prompts[i])), prompts, micro_tokens):
                chances = first_letter_chances(model, [prompts[i] for i in rows], letters)
                for i, chance in zip(rows, chances, strict=True):
                    votes[i] = chance
        return votes

    return Judge("self", compare, counts=counts)


def letter_ids(tokenizer) -> tuple[int, int]:
    """Token ids of "A" and "B", or of " A" and " B" where the bare letters are not single tokens."""
    for form in ("{}", " {}"):
        ids = [tokenizer.encode(form.format(letter), add_special_tokens=False) for letter in "AB"]
        if all(len(one) == 1 for one in ids) and ids[0] != ids[1]:
            return ids[0][0], ids[1][0]
    raise UserError("judge=self: the tokenizer has no single token for the letters A and B; "
                    "use judge=openai or judge=rules")


def _chat_ids(tokenizer, prompt: str) -> list[int]:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                             add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(prompt + "\nVerdict:")


def _batches(rows: list[int], prompts: list[list[int]], micro_tokens: int):
    """Splits rows, sorted by length, into batches of at most micro_tokens padded tokens (at least one
    row)."""
    batch: list[int] = []
    for row in rows:
        if batch and len(prompts[row]) * (len(batch) + 1) > micro_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def first_letter_chances(model, prompts: list[list[int]], letters: tuple[int, int]) -> list[float]:
    """P(A) / (P(A) + P(B)) of the token after each prompt; None where that is not a number. Right-padded:
    with a causal model, padding after the last token changes nothing before it."""
    lengths = torch.tensor([len(ids) for ids in prompts])
    width = int(lengths.max())
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)                       # (B, T)
    for row, ids in enumerate(prompts):
        input_ids[row, :len(ids)] = torch.tensor(ids)
    mask = (torch.arange(width)[None] < lengths[:, None]).long()                         # (B, T)
    lm_head = head(model)
    device = lm_head.weight.device
    hidden = hidden_states(model, input_ids.to(device), attention_mask=mask.to(device))  # (B, T, D)
    last = hidden[torch.arange(len(prompts), device=device), lengths.to(device) - 1]     # (B, D)
    targets = torch.tensor(letters, device=device).repeat_interleave(len(prompts))       # (2B,) A..., B...
    logp = linear_logp(last.repeat(2, 1), lm_head.weight, targets, **lm_head.kernel_args()).view(2, -1)
    chances = torch.sigmoid(logp[0] - logp[1]).tolist()                                  # (B,)
    return [chance if chance == chance else None for chance in chances]


def openai_judge(url: str, model: str = "", *, key_env: str = "OPENAI_API_KEY", timeout_s: float = 30.0,
                 retries: int = 3, concurrency: int = 8, rubric: str | Path = RUBRIC,
                 max_chars: int = 4000) -> Judge:
    """Any OpenAI-compatible chat endpoint. The reply must be A, B or TIE; everything else is no vote."""
    rubric = load_rubric(rubric)
    client = ChatClient(url, model, key_env=key_env, timeout_s=timeout_s, retries=retries,
                        concurrency=concurrency)

    def compare(pairs: list[Pair]) -> list[float | None]:
        replies = client.chat_many([judge_prompt(rubric, pair, max_chars) for pair in pairs])
        return [None if reply is None else read_verdict(reply) for reply in replies]

    return Judge(f"openai:{model or 'default'}", compare, client.ping, client.counts)


def read_verdict(reply: str) -> float | None:
    """1.0 for A, 0.0 for B, 0.5 for TIE; None for anything that is not exactly one of them, in any dress
    ("**A**", "[[B]]", "Verdict: TIE.")."""
    if len(reply) > 80:
        return None
    match = re.fullmatch(r"\W*(?:(?:verdict|answer|solution)\W+)?(a|b|tie)\W*", reply, re.I)
    return VERDICTS[match.group(1).upper()] if match else None


# ---------------------------------------------------------------- win probabilities

def judge_groups(judge: Judge,
                 groups: list[tuple[str, list[Candidate]]]) -> tuple[list[list[float | None]], dict]:
    """Judges all groups, each (problem, candidates), in one batch of comparisons.

    Returns (wins, stats). wins[g][i] is the mean of p_ij over the other right candidates j of the group that
    got a vote in both orders; None for wrong candidates, for those without a vote, and in groups with fewer
    than two right candidates, which are not judged. Identical texts tie at 1/2 without being asked. A judge
    that raises costs its votes, not the run. stats: groups, judged, skipped, comparisons (questions asked),
    identical, no_votes, position_bias (mean of v(i, j) + v(j, i) - 1: above 0 it likes what stands first),
    order_conflicts (share of pairs whose winner changes with the order), error ("" or the judge's exception),
    seconds. """
    start = time.monotonic()
    questions: dict[tuple[int, str, str], Pair] = {}
    matches, identical, judged = [], 0, 0
    for g, (problem, candidates) in enumerate(groups):
        right = [i for i, candidate in enumerate(candidates) if candidate.right]
        judged += len(right) >= 2
        for a, i in enumerate(right):
            for j in right[a + 1:]:
                first, second = candidates[i], candidates[j]
                matches.append((g, i, j))
                if first.text.strip() == second.text.strip():
                    identical += 1
                    continue
                questions.setdefault((g, first.text, second.text), Pair(problem, first, second))
                questions.setdefault((g, second.text, first.text), Pair(problem, second, first))
    votes, error = _ask(judge, questions)
    wins, biases, conflicts = _tally(groups, matches, votes)
    stats = {"judge": judge.name, "groups": len(groups), "judged": judged, "skipped": len(groups) - judged,
             "comparisons": len(questions), "identical": identical,
             "no_votes": sum(vote is None for vote in votes.values()),
             "position_bias": sum(biases) / len(biases) if biases else 0.0,
             "order_conflicts": sum(conflicts) / len(conflicts) if conflicts else 0.0,
             "error": error, "seconds": time.monotonic() - start}
    return wins, stats


def _ask(judge: Judge, questions: dict) -> tuple[dict, str]:
    """Votes by the key of the question, and the judge's exception in words: a failing judge must not end a
    run."""
    if not questions:
        return {}, ""
    try:
        votes = judge.compare(list(questions.values()))
        if len(votes) != len(questions):
            raise ValueError(f"{len(votes)} votes for {len(questions)} questions")
        error = ""
    except Exception as problem:                 # whatever it is, it is counted and shown
        votes, error = [None] * len(questions), f"{type(problem).__name__}: {problem}"[:300]
    return dict(zip(questions, votes, strict=True)), error


def _tally(groups, matches, votes):
    chances: dict[tuple[int, int], list[float]] = {}
    biases, conflicts = [], []
    for g, i, j in matches:
        first, second = groups[g][1][i].text, groups[g][1][j].text
        if first.strip() == second.strip():
            p = 0.5
        else:
            forward, backward = votes[g, first, second], votes[g, second, first]
            if forward is None or backward is None:
                continue                         # one order alone would carry the position bias
            p = (forward + 1.0 - backward) / 2.0
            biases.append(forward + backward - 1.0)
            conflicts.append((forward - 0.5) * (backward - 0.5) > 0)
        chances.setdefault((g, i), []).append(p)
        chances.setdefault((g, j), []).append(1.0 - p)
    wins = [[sum(got) / len(got) if (got := chances.get((g, i))) else None for i in range(len(candidates))]
            for g, (_, candidates) in enumerate(groups)]
    return wins, biases, conflicts


def win_probabilities(judge: Judge, problem: str,
                      candidates: list[Candidate]) -> tuple[list[float | None], dict]:
    """`judge_groups` for one group."""
    wins, stats = judge_groups(judge, [(problem, candidates)])
    return wins[0], stats
