"""AI judges of pairs and lists, and the win probabilities of the right candidates of a group.

A judge is asked "is the first one better?" and answers with a probability, or None for no vote. Three judges:
`rules_judge` (deterministic), `self_judge` (the training model with its adapter off), `openai_judge` (an
OpenAI-compatible endpoint). What they are shown is in rubrics.py, which pairs they are asked about in compare.py.

Both orders are asked of every pair, by `judge_groups` and never by a judge itself:
p_ij = (v(i, j) + 1 - v(j, i)) / 2, so that a judge that likes position A whatever stands there says 1/2. Lists, of
which a judge names the best, are asked in all rotations for the same reason (listwise.py).
"""
from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from minimath.judges.compare import Fit, round_robin, swiss_pairs, swiss_rounds
from minimath.judges.compare import win_probabilities as wins_of
from minimath.core.errors import UserError
from minimath.judges.endpoint import ChatClient, client_for, is_fault
from minimath.judges.listwise import choices_differ, list_wins, lists_of, place_lean, rotations, separable
from minimath.judges.rubrics import (
    LETTERS,
    Candidate,
    Listing,
    Pair,
    judge_prompt,
    list_prompt,
    list_rubric,
    load_rubric,
    make_nonce,
)
from minimath.judges.self_judge import self_compare, verdict_ids
from minimath.grading.steps import StepCount

__all__ = ["Candidate", "Judge", "Pair", "StepCount", "both_orders", "client_judge", "judge_groups", "make_judge",
           "openai_judge", "read_letter", "read_verdict", "rules_judge", "self_judge", "win_probabilities"]

VERDICTS = {"A": 1.0, "B": 0.0, "TIE": 0.5}


@dataclass
class Judge:
    """compare(pairs) -> one probability in [0, 1] that `first` is better, or None (no vote), per pair. ping()
    raises UserError when the judge can't be used; it is called before any long work. `counts`: what it cost
    so far. `soft`: its votes are probabilities, not verdicts (see both_orders). `plan`: round_robin, swiss or listwise,
    which needs choose(lists) -> of each candidate the probability that it is the best, adding up to 1, or None.
    `fallback`: what becomes of pairs without votes: none (they drop out), rules (the rules judge's votes) or stop."""
    name: str
    compare: Callable[[list[Pair]], list[float | None]]
    ping: Callable[[], None] = lambda: None
    counts: dict = field(default_factory=dict)
    soft: bool = False
    plan: str = "round_robin"
    fallback: str = "none"
    choose: Callable[[list[Listing]], list[list[float] | None]] | None = None


def make_judge(cfg, model=None, tokenizer=None, *, prompt=judge_prompt) -> Judge:
    """The judge that cfg.judge.name names: rules, self (needs model and tokenizer), openai. prompt(rubric, pair, max_chars,
    specials): what self and openai are asked."""
    if cfg.judge.name == "rules":
        judge = rules_judge()
    elif cfg.judge.name == "self":
        judge = self_judge(model, tokenizer, rubric=cfg.judge.rubric, max_chars=cfg.judge_max_chars,
                           micro_batch_tokens=cfg.optimizer.micro_batch_tokens, prompt=prompt)
    elif cfg.judge.name == "openai":
        judge = client_judge(client_for(cfg), cfg.judge.rubric, cfg.judge_max_chars, prompt)
    else:
        raise UserError(f"judge={cfg.judge.name!r}: use self, openai or rules")
    judge.plan, judge.fallback = cfg.judge.pairs, cfg.judge.fallback
    if judge.plan == "listwise" and cfg.judge.name != "rules":
        list_rubric(load_rubric(cfg.judge.rubric), len(LETTERS))
    if judge.plan == "listwise" and cfg.judge.name == "self":
        verdict_ids(tokenizer, LETTERS)
    return judge


# ---------------------------------------------------------------- the three judges

def rules_judge() -> Judge:
    """Deterministic and offline: a right answer beats a wrong one; then the higher share of right steps (no
    checkable step counts as 0); then fewer tokens; then a tie."""
    def merit(candidate: Candidate):
        share = candidate.steps.right / candidate.steps.total if candidate.steps.total else 0.0
        return candidate.right, share, -candidate.tokens

    def compare(pairs: list[Pair]) -> list[float | None]:
        return [0.5 if merit(a) == merit(b) else float(merit(a) > merit(b)) for _, a, b, _ in pairs]

    def choose(lists: list[Listing]) -> list[list[float] | None]:
        merits = [[merit(candidate) for candidate in listing.candidates] for listing in lists]
        return [[(one == max(of_list)) / of_list.count(max(of_list)) for one in of_list] for of_list in merits]

    return Judge("rules", compare, choose=choose)


def self_judge(model, tokenizer, *, rubric: str | Path = "maths", max_chars: int = 4000,
               micro_batch_tokens: int = 4096, prompt=judge_prompt) -> Judge:
    """The model itself, adapter off: P(A) + P(TIE) / 2 among the three verdicts, of the first token of its reply.
    No text is generated or parsed. Prompts longer than the model's context get no vote."""
    compare, choose, counts = self_compare(model, tokenizer, rubric=load_rubric(rubric), max_chars=max_chars,
                                           micro_batch_tokens=micro_batch_tokens, prompt=prompt)
    return Judge("self", compare, counts=counts, soft=True, choose=choose)


def openai_judge(url: str, model: str = "", *, rubric: str | Path = "maths", max_chars: int = 4000,
                 **options) -> Judge:
    """Any OpenAI-compatible chat endpoint; options: further fields of endpoint.ChatClient."""
    return client_judge(ChatClient(url, model, **options), rubric, max_chars)


def client_judge(client: ChatClient, rubric: str | Path, max_chars: int, prompt=judge_prompt) -> Judge:
    """A judge behind a ChatClient: probabilities where the server has log-probs (soft once ping has found that out),
    else A, B or TIE; everything else is no vote."""
    rubric = load_rubric(rubric)

    def compare(pairs: list[Pair]) -> list[float | None]:
        return client.verdicts([prompt(rubric, pair, max_chars) for pair in pairs], read_verdict)

    def choose(lists: list[Listing]) -> list[list[float] | None]:
        return client.choices([(list_prompt(rubric, listing, max_chars), LETTERS[:len(listing.candidates)])
                               for listing in lists], read_letter)

    def ping() -> None:
        judge.soft = "logprobs" in client.ping()

    judge = Judge(f"openai:{client.model or 'default'}", compare, ping, client.counts, choose=choose)
    return judge


def read_verdict(reply: str) -> float | None:
    """1.0 for A, 0.0 for B, 0.5 for TIE; None for anything that is not exactly one of them, in any dress
    ("**A**", "[[B]]", "Verdict: TIE.")."""
    return VERDICTS.get(read_letter(reply))


def read_letter(reply: str, letters: str = "AB") -> str | None:
    """One of the letters or "TIE", in any dress; None for anything that is not exactly one of them."""
    if len(reply) > 80:
        return None
    match = re.fullmatch(rf"\W*(?:(?:verdict|answer|solution)\W+)?([{letters}]|tie)\W*", reply, re.I)
    return match.group(1).upper() if match else None


# ---------------------------------------------------------------- win probabilities

@dataclass
class Contest:
    """The right candidates of a group, one of each text, and what came of their comparisons."""
    problem: str
    texts: list[Candidate]
    copies: list[int]
    place: list[int | None]  # of each candidate of the group in `texts`; None: wrong
    nonce: str
    asked: set[tuple[int, int]] = field(default_factory=set)  # pairs, alone or in one list
    results: list[tuple] = field(default_factory=list)  # (i, j, p), or the answers (order, shares) to lists


def judge_groups(judge: Judge, groups: list[tuple[str, list[Candidate]]]) -> tuple[list[list[float | None]], dict]:
    """Judges all groups, each (problem, candidates), side by side: one batch of questions per round of judge.plan.

    Returns (wins, stats). wins[g][i] is the mean score of i against the other right candidates of the group
    (compare.win_probabilities; identical texts tie); None for wrong candidates and for those without a vote.
    round_robin, the default, asks about every pair: its wins are plain means and depend on no model. swiss asks
    about (ceil(log2 n) + 1) n / 2 pairs and takes the others from the fit: it saves from n = 5 on, 43% at n = 8.
    listwise asks for the best of up to LIST_MAX, n questions (2 n beyond that) instead of n (n - 1), and takes all wins
    from the fit of listwise.py. A judge that gives letters, not probabilities, then says little of the second best.

    Nothing is asked where it can't change an advantage: with fewer than two right candidates (`skipped_gate`) or
    all of them one text (`skipped_equal`). A pair without a vote in both orders drops out, and so does a list whose
    rotations with a vote do not tell candidates from places; judge.fallback can put
    the rules judge's votes there. A judge that raises costs its votes, not the run.

    stats: judge, plan, groups, judged, skipped, skipped_gate, skipped_equal, comparisons (questions asked: two per
    pair, k per list of k), unasked (pairs that were in no question), identical (pairs of equal texts), no_votes,
    position_bias (mean of v(i, j) + v(j, i) - 1, of lists listwise.place_lean: above 0 it likes what stands first),
    order_conflicts (share of pairs or lists whose winner changes with the order), fit_se (mean standard error of a
    strength, in log-odds), misfit (compare.Fit; mean over the judged groups), fallbacks (pairs or lists that the rules
    judge took over), counts (what an endpoint's counts grew by), error ("" or the judge's exception), seconds. """
    start = time.monotonic()
    contests = [make_contest(problem, candidates) for problem, candidates in groups]
    facts, before = {"comparisons": 0, "no_votes": 0, "fallbacks": 0, "error": ""}, dict(judge.counts)
    fits, biases, conflicts = (judge_lists if judge.plan == "listwise" else judge_pairs)(judge, contests, facts)
    wins = [[None if place is None else of_text[place] for place in contest.place]
            for contest, (of_text, _) in zip(contests, fits, strict=True)]
    facts |= counted(contests, [fit for _, fit in fits]) | {"counts": counts_since(judge, before)}
    if judge.fallback == "stop":
        stop_if_down(judge, facts)
    return wins, facts | {"judge": judge.name, "plan": judge.plan, "position_bias": mean(biases),
                          "order_conflicts": mean(conflicts), "seconds": time.monotonic() - start}


def judge_pairs(judge: Judge, contests: list[Contest], facts: dict) -> tuple[list, list[float], list[bool]]:
    """Asks about pairs until judge.plan is through; ((wins, fit) of each contest, bias and conflict of each pair)."""
    biases: list[float] = []
    conflicts: list[bool] = []
    while not facts["error"]:
        due = [(contest, pair) for contest in contests for pair in next_pairs(judge, contest)]
        if not due:
            break
        votes = _ask(judge.compare, [question for contest, pair in due for question in both(contest, *pair)], facts)
        for (contest, (i, j)), forward, backward in zip(due, votes[::2], votes[1::2], strict=True):
            contest.asked.add((i, j))
            if forward is not None and backward is not None:  # one order alone would carry the position bias
                contest.results.append((i, j, both_orders(forward, backward, judge.soft)))
                biases.append(forward + backward - 1.0)
                conflicts.append((forward - 0.5) * (backward - 0.5) > 0)
            elif judge.fallback == "rules":  # for both orders: half of two judges would be biased by the first's
                contest.results.append((i, j, rules_judge().compare([both(contest, i, j)[0]])[0]))
                facts["fallbacks"] += 1
    return [wins_of(len(c.texts), c.results, ties=not judge.soft, copies=c.copies) for c in contests], biases, conflicts


def judge_lists(judge: Judge, contests: list[Contest], facts: dict) -> tuple[list, list[float], list[bool]]:
    """`judge_pairs` for lists, which are asked all at once; a list with all its answers has a bias and a conflict."""
    if judge.choose is None:
        raise UserError(f"judge_plan=listwise: the judge {judge.name} compares pairs only; use round_robin or swiss")
    due = [(contest, listed) for contest in contests for listed in lists_of(len(contest.texts))]
    questions = [Listing(contest.problem, tuple(contest.texts[i] for i in order), contest.nonce)
                 for contest, listed in due for order in rotations(listed)]
    votes = iter(_ask(judge.choose, questions, facts) if questions else [])
    biases: list[float] = []
    conflicts: list[bool] = []
    for contest, listed in due:
        contest.asked |= {(min(i, j), max(i, j)) for i in listed for j in listed if i != j}
        answers = [(order, next(votes)) for order in rotations(listed)]
        answered = [r for r, (_, shares) in enumerate(answers) if shares is not None]
        if separable(len(listed), answered):
            contest.results += [answers[r] for r in answered]
        elif judge.fallback == "rules":
            [shares] = rules_judge().choose([Listing(contest.problem, tuple(contest.texts[i] for i in listed))])
            contest.results += [(order, [shares[listed.index(i)] for i in order]) for order in rotations(listed)]
            facts["fallbacks"] += 1
        if len(answered) == len(listed):
            biases.append(place_lean(answers))
            conflicts.append(choices_differ(answers))
    return [list_wins(len(c.texts), c.results, soft=judge.soft, copies=c.copies) for c in contests], biases, conflicts


def make_contest(problem: str, candidates: list[Candidate]) -> Contest:
    texts: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.right:
            texts.setdefault(candidate.text.strip(), candidate)
    number = {text: k for k, text in enumerate(texts)}
    place = [number[c.text.strip()] if c.right else None for c in candidates]
    return Contest(problem, list(texts.values()), [place.count(k) for k in range(len(texts))], place,
                   make_nonce(problem, *texts))


def next_pairs(judge: Judge, contest: Contest) -> list[tuple[int, int]]:
    """The pairs of the contest's next round; none when it is over."""
    n = len(contest.texts)
    if judge.plan == "round_robin":
        return [] if contest.asked else round_robin(n)
    if judge.plan != "swiss":
        raise UserError(f"judge_plan={judge.plan!r}: use round_robin, swiss or listwise")
    per_round = n // 2
    if len(contest.asked) >= swiss_rounds(n) * per_round:
        return []
    strengths = wins_of(n, contest.results, ties=not judge.soft)[1].strengths
    return swiss_pairs(strengths, contest.asked)


def both(contest: Contest, i: int, j: int) -> tuple[Pair, Pair]:
    first, second = contest.texts[i], contest.texts[j]
    return (Pair(contest.problem, first, second, contest.nonce), Pair(contest.problem, second, first, contest.nonce))


def both_orders(forward: float, backward: float, soft: bool = False) -> float:
    """p_ij = (v(i, j) + 1 - v(j, i)) / 2 of the votes forward = v(i, j) and backward = v(j, i).

    soft: the votes are a model's probabilities, whose liking for a position adds to the log-odds, the same b in both
    orders: logit v(i, j) = b + d, logit v(j, i) = b - d. Their mean, b, is taken out of both first; both then say
    sigmoid(d), where the formula on the votes as they are would draw p to 1/2 the more, the larger b. A vote of exactly
    0, 1/2 or 1 is a verdict also there, as from a server that gave no log-probs this once.
    """
    if soft and not {forward, backward} & {0.0, 0.5, 1.0}:
        odds, reverse = logit(forward), logit(backward)
        bias = (odds + reverse) / 2
        forward, backward = sigmoid(odds - bias), sigmoid(reverse - bias)
    return (forward + 1.0 - backward) / 2.0


def logit(p: float) -> float:
    return math.log(p / (1.0 - p))


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def counted(contests: list[Contest], fits: list[Fit]) -> dict:
    """What was judged and what was not, and how well the fits are pinned down."""
    rights = [sum(c.copies) for c in contests]
    gate = sum(right < 2 for right in rights)
    equal = sum(right >= 2 and len(c.texts) == 1 for right, c in zip(rights, contests, strict=True))
    judged = [fit for c, fit in zip(contests, fits, strict=True) if c.results]
    return {"groups": len(contests), "judged": len(contests) - gate - equal, "skipped": gate + equal,
            "skipped_gate": gate, "skipped_equal": equal,
            "unasked": sum(len(round_robin(len(c.texts))) - len(c.asked) for c in contests),
            "identical": sum(k * (k - 1) // 2 for c in contests for k in c.copies),
            "fit_se": mean([float(fit.se.mean()) for fit in judged]), "misfit": mean([fit.misfit for fit in judged])}


def mean(values: list) -> float:
    return sum(values) / len(values) if values else 0.0


def _ask(ask: Callable[[list], list], questions: list, facts: dict) -> list:
    """The votes, counted in facts, as is the judge's exception in words: a failing judge must not end a run."""
    try:
        votes = ask(questions)
        if len(votes) != len(questions):
            raise ValueError(f"{len(votes)} votes for {len(questions)} questions")
    except Exception as problem:  # whatever it is, it is counted and shown
        votes, facts["error"] = [None] * len(questions), f"{type(problem).__name__}: {problem}"[:300]
    facts["comparisons"] += len(votes)
    facts["no_votes"] += sum(vote is None for vote in votes)
    return votes


def counts_since(judge: Judge, before: dict) -> dict:
    """What a judge that adds up its counts has spent and met with since then."""
    if not isinstance(judge.counts, Counter):
        return {}
    return {name: n - before.get(name, 0) for name, n in judge.counts.items() if n != before.get(name, 0)}


def stop_if_down(judge: Judge, facts: dict) -> None:
    """judge_fallback=stop: UserError when the breaker opened, the judge raised, or not one question got a vote."""
    asked, lost = facts["comparisons"], facts["no_votes"]
    if lost and (facts["error"] or lost == asked or facts["counts"].get("given up")):
        met = [f"{n:g} x {name}" for name, n in facts["counts"].items() if is_fault(name)]
        raise UserError(f"the judge {judge.name} is down: {lost} of {asked} questions have no vote "
                        f"({', '.join(met) or facts['error'] or 'unreadable replies'}), and judge_fallback=stop ends "
                        "the run then; see to the judge, or go on with judge_fallback=rules or none")


def win_probabilities(judge: Judge, problem: str,
                      candidates: list[Candidate]) -> tuple[list[float | None], dict]:
    """`judge_groups` for one group."""
    wins, stats = judge_groups(judge, [(problem, candidates)])
    return wins[0], stats
