"""Judge faults: 12 kinds at 1, 10, 50 and 100% of the calls of an endpoint judge; alone, and in whole RL steps.

Held to: the time that the options promise, no exception, the right vote of every call that went well, none of the
others, and no effect of a pair without both its votes on any advantage.
"""
import contextlib
import io
import math
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

from fault_server import FAULTS, MIXED, SHARES, TLS, FaultServer, make_pem, shorter
from harness import Tally, model_and_data
from judging import sample
from toy import make_config, metrics

import minimath.train.rewards as rewards
from minimath.config.schema import JudgeOptions, RLAIFConfig
from minimath.core.errors import UserError
from minimath.data.examples import Example
from minimath.data.sample import Group
from minimath.judges.base import HeuristicJudge, Pair
from minimath.judges.compare import both_orders, choose_pairs
from minimath.judges.compare import win_probabilities as wins_of
from minimath.judges.endpoint import EndpointJudge, is_fault
from minimath.judges.judge import judge_groups
from minimath.judges.rubrics import judge_prompt, load_rubric
from minimath.train.advantages import group_advantages
from minimath.train.rlaif import rlaif

TIMEOUT_S, RETRIES, CONCURRENCY, BREAKER, STEP_S = 0.3, 1, 8, 16, 6.0
PAUSE_S = 1.0  # of Retry-After
SLACK_S = 4.0  # of a busy machine, for threads and its own work
SIZE = 4  # candidates of a group: 12 questions
GROUPS = {0.01: 25, 0.1: 10, 0.5: 4, 1.0: 4}
REWARD = rewards.JudgeReward(RLAIFConfig(judge_weight=0.25, brevity_weight=0.25))
WITHOUT_REPLY = {"given_up", "out_of_time"}
PAIRS = choose_pairs(SIZE, 0, "")


def run(full: bool, folder: Path) -> list[Tally]:
    pem = make_pem(folder)
    short = mock.patch("openai._base_client.INITIAL_RETRY_DELAY", 0.02)
    with short, mock.patch.dict(os.environ, {"SSL_CERT_FILE": str(pem)}):
        tallies = [cell(fault, share, pem, GROUPS[share] if full else 2)
                   for fault in (*FAULTS, TLS, MIXED) for share in (SHARES if full else (0.5,))]
        tallies += [bad_addresses(), fallback_of_a_group()]
        return tallies + whole_runs(full, folder, pem)


# ---- the judge alone

def make_groups(count: int) -> list[Group]:
    """Groups of SIZE correct samples of different lengths, in an order that changes with the group."""
    groups = []
    for g in range(count):
        texts = [f"5 * {g} = {5 * g}. " + "We check that. " * ((i + g) % SIZE) + f"\\boxed{{{5 * g}}}"
                 for i in range(SIZE)]
        groups.append(Group(Example(f"What is 5 times {g}?"), [], [sample(t, True, len(t)) for t in texts]))
    return groups


def judge_at(url: str, **changes) -> EndpointJudge:
    """An endpoint judge with short times; changes: of its attributes."""
    judge = EndpointJudge(JudgeOptions(url=url, model="judge-1", timeout_s=TIMEOUT_S, concurrency=CONCURRENCY))
    vars(judge).update({"retries": RETRIES, "breaker": BREAKER, "round_s": STEP_S} | changes)
    return judge


def quick(server: FaultServer, **changes):
    """(judge, asked): an endpoint judge with short times, and the list that its questions and votes are put in."""
    soft = server.fault == MIXED
    judge, asked = judge_at(server.url, soft=soft, form="logprobs" if soft else "plain", **changes), []
    ask = judge.compare

    def compare(pairs):
        votes = ask(pairs)
        asked.extend(zip(pairs, votes, strict=True))
        return votes

    judge.compare = compare
    return judge, asked


def cell(fault: str, share: float, pem: Path, count: int) -> Tally:
    """One fault at one share of the calls of `count` groups."""
    tally, groups = Tally(f"judge faults: {fault}, {share:.0%} of calls"), make_groups(count)
    with FaultServer(fault, share, pem=pem) as server:
        judge, asked = quick(server)
        start = time.monotonic()
        wins, stats = judge_groups(judge, groups)
        took = time.monotonic() - start
    counts = judge.counts
    bound = min(STEP_S, bound_s(len(asked), share)) + SLACK_S
    tally.add(took <= bound and not stats["error"], f"{took:.1f} s of {bound:.1f}, {stats['error']}")
    served = sum(n for name, n in server.served.items() if name)
    failures = sum(n for name, n in counts.items() if is_fault(name) and name not in WITHOUT_REPLY)
    tally.add(failures >= served, f"{served} faults served, counted: {dict(counts)}")
    if share == 1.0 and not counts["unreadable"]:
        most = (BREAKER + CONCURRENCY) * (RETRIES + 1)
        tally.add(counts["requests"] <= most, f"{counts['requests']} requests to a dead server, {most} at most")
    check_votes(tally, server, counts, asked, spare=failures - served)
    check_wins(tally, judge, groups, wins, [vote for _, vote in asked])
    return tally


def bound_s(questions: int, share: float) -> float:
    """The seconds that timeout_s, retries, concurrency and, where every call fails, the breaker promise."""
    if share == 1.0:
        questions = min(questions, BREAKER + CONCURRENCY)
    return math.ceil(questions / CONCURRENCY) * (2 * TIMEOUT_S * (RETRIES + 1) + PAUSE_S * RETRIES)


def check_votes(tally: Tally, server: FaultServer, counts, asked, spare: int) -> None:
    """Each vote against what the server did. spare: calls that failed without a fault, on too busy a machine."""
    rubric, missing = load_rubric("maths"), 0
    for number, (pair, vote) in enumerate(asked):
        prompt = judge_prompt(rubric, pair)
        due = went_well(server, prompt)
        right = vote is None or (vote > 0.5) == (shorter(prompt) == "A")
        missing += vote is None and due is True
        tally.add(right and (vote is None or due is not False), f"question {number}: vote {vote}, a good reply: {due}")
    opened = counts["given_up"] or counts["out_of_time"]
    tally.add(opened or missing <= spare, f"{missing} votes of good replies are missing: {dict(counts)}")
    if server.fault == TLS:
        lost = sum(vote is None for _, vote in asked)
        tally.add(opened or lost * (RETRIES + 1) <= server.served.get(TLS, 0), f"{lost} lost: {dict(counts)}")


def went_well(server: FaultServer, prompt: str) -> bool | None:
    """Whether one of the tries for this prompt gets a good reply; None where the prompt does not tell."""
    if server.fault == TLS:
        return False if server.share == 1.0 else None
    for attempt in range(RETRIES + 1):
        fault = server.planned(prompt, attempt)
        if not fault or FAULTS[fault][2] != "sdk":
            return not fault
    return False


def check_wins(tally: Tally, judge, groups, wins, votes, fallback=None) -> None:
    """The wins of each group are those of its judged pairs alone, and what has no vote has no say in an advantage."""
    for g, group in enumerate(groups):
        own = votes[g * 2 * len(PAIRS):(g + 1) * 2 * len(PAIRS)]
        judged = [(i, j, both_orders(f, b, judge.soft)) for (i, j), f, b in zip(PAIRS, own[::2], own[1::2], strict=True)
                  if f is not None and b is not None]
        if fallback:
            known = {(i, j) for i, j, _ in judged}
            judged += [(i, j, float(len(group.samples[i].text) < len(group.samples[j].text))) for i, j in PAIRS
                       if (i, j) not in known]
        expected = wins_of(SIZE, sorted(judged), [1] * SIZE)
        tally.add(close(wins[g], expected), f"group {g}: wins {wins[g]}, of the judged pairs {expected}")
        rewarded, plain = (paid(group, win) for win in (wins[g], [None] * SIZE))
        met = {i for pair in judged for i in pair[:2]}
        tally.add(all(rewarded[i] == plain[i] for i in range(SIZE) if i not in met), f"group {g}: paid without a vote")
        if not judged:
            same = group_advantages([rewarded]).equal(group_advantages([plain]))
            tally.add(same, f"group {g}: an advantage without a vote")


def paid(group: Group, wins: list) -> list[float]:
    """The rewards of a group with these wins."""
    for one, win in zip(group.samples, wins, strict=True):
        one.win = win
    return REWARD.rewards(group)


def close(a: list, b: list) -> bool:
    return all(x == y if x is None or y is None else abs(x - y) < 1e-6 for x, y in zip(a, b, strict=True))


def bad_addresses() -> Tally:
    """What can be no address is told in one line, by the ping; asked without one, it costs votes, not the run."""
    tally = Tally("judge faults: addresses that can't be")
    for url in ("http://a..b/v1", f"http://{'a' * 70}.example/v1", "http://127.0.0.1:99999/v1", "http://127.0.0.1:x/v1",
                "http://127.0.0.1/v 1", "http://127.0.0.1:9/\u00e4/v1", "http://[::1/v1"):
        try:
            judge = judge_at(url, retries=0)
            votes = judge.compare([Pair("p", *make_groups(1)[0].samples[:2])])
            judge.ping()
            tally.add(False, f"{url} was taken")
        except UserError as error:
            tally.add("judge" in str(error), f"{url}: {error}")
        except Exception as error:
            tally.add(False, f"{url}: {type(error).__name__}: {error}")
        else:
            tally.add(votes == [None], f"{url}: {votes}")
    return tally


def fallback_of_a_group() -> Tally:
    """judge_fallback=heuristic and stop, with a judge that is down and with one that is shaky."""
    tally, groups = Tally("judge faults: judge_fallback"), make_groups(4)
    for k in (0, 2):
        heuristic = HeuristicJudge(JudgeOptions(pairs=k))
        with FaultServer("500", 1.0) as server:
            judge, _ = quick(server, pairs=k, fallback="heuristic")
            wins, stats = judge_groups(judge, groups)
            own = all(map(close, wins, judge_groups(heuristic, groups)[0]))
            tally.add(own, f"judge_pairs={k}: not the wins of the heuristic judge")
            tally.add(stats["fallbacks"] > 0 and stats["no_votes"] == stats["comparisons"], f"{k}: {stats}")
            judge.fallback = "stop"
            try:
                judge_groups(judge, groups)
                tally.add(False, f"judge_pairs={k}: judge_fallback=stop went on")
            except UserError as error:
                tally.add("http_500" in str(error) and "judge_fallback" in str(error), f"{k}: {error}")
    with FaultServer(MIXED, 0.5) as server:
        judge, asked = quick(server, fallback="heuristic")
        wins, _ = judge_groups(judge, groups)
        check_wins(tally, judge, groups, wins, [vote for _, vote in asked], fallback="heuristic")
    with FaultServer("both letters", 0.2) as server:
        judge, _ = quick(server)
        judge.fallback = "stop"
        wins, stats = judge_groups(judge, groups)  # some bad replies: that judge is not down
        tally.add(0 < stats["no_votes"] < stats["comparisons"], f"{stats}")
    return tally


# ---- whole RL steps

STEPS = 2


def whole_runs(full: bool, folder: Path, pem: Path) -> list[Tally]:
    model, data = model_and_data(folder, n=12)
    tallies = []
    cases = [(MIXED, 0.5), *((fault, 1.0) for fault in (*FAULTS, TLS) if full)]
    for number, (fault, share) in enumerate(cases):
        tally = Tally(f"judge faults: RL run, {fault}, {share:.0%} of calls")
        with FaultServer(fault, share, pem=pem) as server:
            server.calm = 1  # the ping
            check_run(tally, server, *train(folder / f"run{number}", model, data, server))
        tallies.append(tally)
    return [*tallies, fallback_in_a_run(folder, model, data)]


def train(out: Path, model: str, data: str, server: FaultServer, on_scored=None, **options):
    """(summary, out, [(groups, statistics of the judge)]) of a short RL run with the endpoint judge."""
    options = {"steps": STEPS, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 16, "max_refill": 0,
               "lora_r": 4, "verifier": "none", "judge": "openai", "judge_url": server.url, "judge_model": "judge-1",
               "judge_timeout_s": TIMEOUT_S, "save_every": 0, "sample_every": 0, **options}
    scored, score = [], rewards.JudgeReward.score

    def record(reward, groups):
        score(reward, groups)
        scored.append((groups, reward.stats[-1]))
        if on_scored:
            on_scored()

    fresh = tempfile.mkdtemp(prefix="replies-", dir=out.parent)  # no reply of another run
    with (mock.patch.object(rewards.JudgeReward, "score", record), contextlib.redirect_stdout(io.StringIO()),
          mock.patch.dict(os.environ, {"MINIMATH_CACHE": fresh})):
        summary = rlaif(make_config(RLAIFConfig, model, out=str(out), data=data, **options))
    return summary, out, scored


def check_run(tally: Tally, server: FaultServer, summary: dict, out: Path, scored) -> None:
    whole = summary["steps"] == STEPS and (out / "adapter" / "adapter_model.safetensors").is_file()
    tally.add(whole and not summary["signal"], f"the run ended with {summary}")
    records, dead = metrics(out), server.share == 1.0
    tally.add(len(records) == STEPS and not any(r["judge/error"] for r in records), f"metrics: {records}")
    for name in ("comparisons", "no_votes"):
        same = sum(r[f"judge/{name}"] for r in records) == sum(stats[name] for _, stats in scored)
        tally.add(same, f"judge/{name} in the metrics is not what the judge counted")
    tally.add(sum(stats["comparisons"] for _, stats in scored) > 0, "the judge was not asked")
    for fault, times in server.served.items():
        kinds = {"unreachable"} if fault == TLS else FAULTS[fault][1] if fault else set()
        told = sum(r.get(f"judge/{kind}", 0) for r in records for kind in kinds)
        tally.add(not fault or told >= times, f"{times} x {fault} served, {told} told in the metrics")
    for group, stats in ((group, stats) for groups, stats in scored for group in groups):
        got = [one.reward for one in group.samples]
        plain = paid(group, [None] * len(got))
        if dead:
            tally.add(stats["no_votes"] == stats["comparisons"] and got == plain,
                      f"rewards without votes {got}, verifier and brevity {plain}")
        else:
            tally.add(all(abs(r - p) <= REWARD.options.judge_weight for r, p in zip(got, plain, strict=True)),
                      f"rewards {got}, verifier and brevity {plain}")


def fallback_in_a_run(folder: Path, model: str, data: str) -> Tally:
    """With judge_fallback=heuristic a dead judge is replaced; with stop the steps are saved, and resume goes on."""
    tally = Tally("judge faults: RL run, judge_fallback")
    with FaultServer("500", 1.0) as server:
        summary, out, scored = train(folder / "heuristic", model, data, server, judge_fallback="heuristic")
        told = sum(record["judge/fallbacks"] for record in metrics(out))
        tally.add(summary["steps"] == STEPS and told == sum(s["fallbacks"] for _, s in scored) > 0, f"{told} fallbacks")
    with FaultServer("500", 0.0) as server:
        def fail():
            server.share = 1.0

        options = {"judge_fallback": "stop", "model": model, "data": data, "server": server}
        try:
            train(folder / "stop", on_scored=fail, **options)
            tally.add(False, "judge_fallback=stop did not stop")
        except UserError as error:
            tally.add("is down" in str(error), str(error))
        saved = (folder / "stop" / "checkpoints" / "step-000001").is_dir()
        tally.add(saved, "the step before the judge went down is not saved")
        server.share = 0.0
        summary, out, _ = train(folder / "stop", resume=True, **options)
        tally.add(summary["steps"] == STEPS and len(metrics(out)) == STEPS, f"after resume {summary}")
    return tally
