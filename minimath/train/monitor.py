"""What an RL step tells about itself: its metrics, its samples, and in plain words the signs of a collapse.

Long RL runs of small models usually end in a collapse (DESIGN: steps 60 to 600), and its signs show before the
accuracy falls: entropy dwindles, completions run long, the solve rate leaves its best. Each is said once, with what
to do about it. The monitor is a json-able dict in the checkpoint: a resumed run says what an unbroken one says.
"""
import statistics

from minimath.train.rewards import PARTS, GroupFacts, length_term, parse_parts

WINDOW = 10  # steps whose mean is compared with that of the first ones: single steps are noise
WATCHED = ("entropy", "mean_tokens", "right", "ended", "problems")
ENTROPY_LEFT = 0.25  # share of the first steps' entropy below which the samples of a group are nearly one text
LENGTH_GROWN = 1.5
MORE_RIGHT = 0.02  # growing this much more right pays for growing longer
CUT_SHARE = 0.3
LEAST_FALL = 0.1  # of the solve rate, and at least FALL_SIGMAS standard errors of a window's mean
FALL_SIGMAS = 6.0  # the best of many windows is a few of them above the mean by chance alone
CANARY_PAIRS = 24  # judged rollout canary pairs of a window: one canary has 16 at most, often 4
CANARY_RISE = 0.15  # of the win rate of wrong completions, and at least CANARY_SIGMAS standard errors
CANARY_SIGMAS = 3.5  # every canary of a run is another chance of a false alarm


def rollout_facts(seen, kept, judged: list[dict]) -> dict:
    """Metrics of a step's rollouts (lists of rlaif.Group: all, and those with a signal; statistics of the judge's
    calls). Token figures are over all completions sampled, right or wrong."""
    completions = [c for g in seen for c in g.completions]
    right_tokens = [len(c.ids) for g in seen for c, ok in zip(g.completions, g.right, strict=True) if ok]
    judged = [stats for stats in judged if stats]
    facts = {"reward": statistics.fmean(r for g in seen for r in g.rewards),
             "right": statistics.fmean(ok for g in seen for ok in g.right),
             "mean_tokens": statistics.fmean(len(c.ids) for c in completions),
             "right_tokens": statistics.fmean(right_tokens) if right_tokens else None,
             "ended": statistics.fmean(c.ended for c in completions), "sampled": len(completions),
             "groups": len(kept), "dropped_groups": len(seen) - len(kept),
             "surprisal": statistics.fmean(-lp for c in completions for lp in c.logp)}
    if judged:
        facts |= judge_facts(judged)
    return facts | part_facts([parts for g in seen if (parts := g.parts)])


def reward_parts(cfg, facts: GroupFacts) -> dict[str, list]:
    """What the rewards of a group are made of, by name; lists are per completion, with None for no vote."""
    if cfg.reward.name == "judge":
        return {"judge": facts.win, "length": length_term(facts.tokens, facts.right), "format": facts.format}
    names = parse_parts(cfg.reward_parts) if cfg.reward.name == "rules" else ()
    return {name: PARTS[name](facts) for name in names if name in PARTS}


def part_facts(groups: list[dict[str, list]]) -> dict:
    """Means of the parts over the groups' completions; of the judge's win probabilities, whose mean is 1/2 in any
    group, the mean distance of the best from the worst."""
    facts = {}
    for name in dict.fromkeys(name for parts in groups for name in parts):
        rows = [[v for v in parts[name] if v is not None] for parts in groups]
        values = [max(row) - min(row) for row in rows if row] if name == "judge" else [v for row in rows for v in row]
        if values:
            facts["judge_spread" if name == "judge" else f"part_{name}"] = statistics.fmean(values)
    return facts


def shown(facts: dict) -> dict:
    """The metrics of a step that go beside its progress bar. tok_s: sampled tokens over the whole step, judge and
    update included."""
    seconds = facts["rollout_seconds"] + facts.get("update_seconds", 0.0)
    parts = {name.removeprefix("part_"): value for name, value in facts.items()
             if name.startswith("part_") or name == "judge_spread"}
    return {"tok_s": facts["sampled"] * facts["mean_tokens"] / max(seconds, 1e-9), "reward": facts["reward"],
            "right": facts["right"], "tokens": facts["mean_tokens"], **parts}


def judge_facts(judged: list[dict]) -> dict:
    """One set of metrics of the rollout rounds of a step: counts added up, means weighted by the questions asked."""
    facts = {f"judge_{k}": sum(s.get(k, 0) for s in judged) for k in
             ("comparisons", "no_votes", "skipped", "skipped_gate", "skipped_equal", "identical", "unasked",
              "fallbacks", "seconds")}
    for name in dict.fromkeys(name for s in judged for name in s.get("counts", {})):  # of an endpoint: its faults, cost
        facts[f"judge_{name.replace(' ', '_')}"] = sum(s.get("counts", {}).get(name, 0) for s in judged)
    asked = max(1, facts["judge_comparisons"])
    for name in ("position_bias", "order_conflicts", "fit_se", "misfit"):
        facts[f"judge_{name}"] = sum(s.get(name, 0.0) * s["comparisons"] for s in judged) / asked
    return facts | {"judge_error": next((s["error"] for s in judged if s["error"]), "")}


def log_group(group, step: int, log) -> None:
    """Keep one whole group in samples.jsonl and print its best and its worst completion."""
    log.sample({"step": step, "problem": group.example.problem, "answer": group.example.answer, "texts": group.texts,
                "right": group.right, "rewards": group.rewards, "advantage": group.advantage})
    order = sorted(range(len(group.texts)), key=lambda i: group.rewards[i])
    for what, i in (("best", order[-1]), ("worst", order[0])):
        parts = "".join(f", {name} {value[i]:.2f}" for name, value in group.parts.items()
                        if value[i] is not None)
        log.show(f"step {step}, {what} of {len(order)} (reward {group.rewards[i]:.2f}, "
                 f"{'right' if group.right[i] else 'wrong'}{parts}, {len(group.completions[i].ids)} tokens)",
                 group.texts[i])


def new_monitor() -> dict:
    """The monitor of a run that begins: first and last WINDOW values by name, best solve rate, kinds already said."""
    return {"first": {name: [] for name in WATCHED}, "last": {name: [] for name in WATCHED}, "best": 0.0, "said": [],
            "canary_first": [], "canary_last": []}


def collapse_warnings(monitor: dict, facts: dict) -> list[str]:
    """Take in the metrics of a step (a step without an update has no entropy) -> new warnings, each kind once a run.

    monitor: of new_monitor, changed in place. Nothing is said before two windows of steps have passed, except that too
    many completions are cut, which needs one, and what the canary pairs tell, which needs CANARY_PAIRS of them.
    """
    problems = facts["groups"] + facts["dropped_groups"]
    for name in WATCHED:
        value = problems if name == "problems" else facts.get(name)
        if value is not None:
            if len(monitor["first"][name]) < WINDOW:
                monitor["first"][name].append(value)
            monitor["last"][name] = [*monitor["last"][name], value][-WINDOW:]
    monitor["steps"] = monitor.get("steps", 0) + 1
    found = {"canary": canary_warning(monitor, facts)}
    now = {name: statistics.fmean(values) for name, values in monitor["last"].items() if values}
    if monitor["steps"] >= WINDOW:
        monitor["best"] = max(monitor["best"], now["right"])
        found |= {"cut": cut_warning(now)}
    if monitor["steps"] >= 2 * WINDOW:
        start = {name: statistics.fmean(values) for name, values in monitor["first"].items() if values}
        found |= {"entropy": entropy_warning(start, now), "length": length_warning(start, now),
                  "right": fall_warning(monitor["best"], now, sum(monitor["last"]["problems"]))}
    new = {kind: text for kind, text in found.items() if text and kind not in monitor["said"]}
    monitor["said"] += new
    return list(new.values())


def entropy_warning(start: dict, now: dict) -> str:
    if "entropy" not in now or now["entropy"] >= ENTROPY_LEFT * start["entropy"]:
        return ""
    return (f"entropy collapse: it fell from {start['entropy']:.3g} to {now['entropy']:.3g} nats a token since the run "
            "began, so the completions of a group become one text and nothing is left to choose from. Lower lr, "
            "raise clip_high, or set entropy_coef=0.001; the best checkpoint is kept")


def length_warning(start: dict, now: dict) -> str:
    if now["mean_tokens"] < LENGTH_GROWN * start["mean_tokens"] or now["right"] > start["right"] + MORE_RIGHT:
        return ""
    return (f"length is running away: completions grew from {start['mean_tokens']:.0f} to {now['mean_tokens']:.0f} "
            f"tokens, but {100 * now['right']:.0f}% are right, {100 * start['right']:.0f}% were at first. Raise "
            "brevity_weight, use overlong=penalty, or look at what the judge likes about long ones")


def cut_warning(now: dict) -> str:
    if 1 - now["ended"] <= CUT_SHARE:
        return ""
    return (f"{100 * (1 - now['ended']):.0f}% of the completions are cut at max_new_tokens and count as wrong. Raise "
            "max_new_tokens, or reward brevity (overlong=penalty)")


def fall_warning(best: float, now: dict, problems: int) -> str:
    """problems: groups in the last window; the completions of a group count as one, as they go together."""
    error = (best * (1 - best) / max(1, problems)) ** 0.5
    if best - now["right"] <= max(LEAST_FALL, FALL_SIGMAS * error):
        return ""
    return (f"the solve rate falls off: {100 * now['right']:.0f}% of the completions of the last {WINDOW} steps are "
            f"right, {100 * best:.0f}% were at its best. Stop here and take the best checkpoint (eval_every keeps "
            "it), or go on with a lower lr or beta=0.01")


def canary_warning(monitor: dict, facts: dict) -> str:
    """Take in the rollout canary of a step, if it has one (judge_canary.canary_facts), and compare the newest pairs
    with the first ones, each at least CANARY_PAIRS of them. monitor: changed in place.

    A pair counts as one trial, which a judge with soft votes or two orders that disagree does not even need.
    """
    wins = facts.get("canary_rollout_worse_wins")
    if wins is None:
        return ""
    first, last = (monitor.setdefault(name, []) for name in ("canary_first", "canary_last"))  # older checkpoints
    # a pair without one of its votes is not counted, without both it is taken off twice: never too many
    pairs = max(1, facts["canary_rollout_pairs"] - facts.get("canary_rollout_no_votes", 0))
    canary = {"pairs": pairs, "wins": wins, "right": statistics.fmean(monitor["last"]["right"]),
              "problems": sum(monitor["last"]["problems"])}
    if pairs_of(first) < CANARY_PAIRS:
        first.append(canary)
        newest = first
    else:
        last.append(canary)
        while pairs_of(last[1:]) >= CANARY_PAIRS:
            del last[0]
        newest = last
    return "" if pairs_of(newest) < CANARY_PAIRS else gap_warning(first, newest)


def pairs_of(canaries: list[dict]) -> int:
    return sum(canary["pairs"] for canary in canaries)


def gap_warning(first: list[dict], newest: list[dict]) -> str:
    """first, newest: windows of canaries; the same one while there is no other."""
    n, before = pairs_of(newest), mean_wins(first)
    wins, pairs = mean_wins(newest), n * pairs_of(first) / (n + pairs_of(first))
    right, right_before = (statistics.fmean(c["right"] for c in window) for window in (newest, first))
    mean = (wins + before) / 2
    risen = wins - before > max(CANARY_RISE, CANARY_SIGMAS * (mean * (1 - mean) / pairs) ** 0.5)
    # the windows of `right` behind the canaries overlap: count the problems of one
    problems = max(1, newest[-1]["problems"])
    noise = 2 * (2 * right_before * (1 - right_before) / problems) ** 0.5
    fooled = wins - 0.5 > CANARY_SIGMAS * (0.25 / n) ** 0.5
    rising = risen and right - right_before <= max(MORE_RIGHT, noise)
    if not (fooled or rising):
        return ""
    change, then = "", ""
    if newest is not first:
        change, then = f" ({100 * before:.0f}% of the first {pairs_of(first)})", f" ({100 * right_before:.0f}% then)"
    meaning = ("the policy is learning to please the judge rather than to be right" if rising else
               "the judge prefers wrong solutions, and a policy that is paid by it will learn to write them")
    return (f"the canary gap opens: judged against right completions, wrong ones win {100 * wins:.0f}% of the last {n} "
            f"pairs{change}; {100 * right:.0f}% of all completions are right{then}. This means that {meaning}. Stop "
            "here and take the best checkpoint (eval_every keeps it), or go on with a stronger judge, gate=exact or a "
            "lower judge_weight")


def mean_wins(canaries: list[dict]) -> float:
    return sum(canary["wins"] * canary["pairs"] for canary in canaries) / pairs_of(canaries)
