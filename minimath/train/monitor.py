"""The signs of a collapse, in plain words, each said once with what to do about it.

Long RL runs of small models usually end in a collapse (steps 60 to 600), and its signs show before the accuracy falls:
entropy dwindles, completions run long, the solve rate leaves its best.
"""
import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from minimath.config.schema import RLAIFConfig
from minimath.core import dist
from minimath.core.state import Kept
from minimath.judges.judge import Judge
from minimath.judges.pairs import Canary

WINDOW = 10  # steps whose mean is compared with that of the first ones: single steps are noise
WATCHED = {"entropy": "policy/entropy", "tokens": "rollout/tokens", "correct": "rollout/correct",
           "finished": "rollout/finished", "problems": "problems"}
ENTROPY_LEFT = 0.25  # share of the first steps' entropy below which the samples of a group are nearly one text
LENGTH_GROWN = 1.5
MORE_CORRECT = 0.02  # growing this much more correct pays for growing longer
CUT_SHARE = 0.3
LEAST_FALL = 0.1  # of the solve rate, and at least FALL_SIGMAS standard errors of a window's mean
FALL_SIGMAS = 6.0  # the best of many windows is a few of them above the mean by chance alone
CANARY_PAIRS = 24  # judged rollout canary pairs of a window: one canary has 16 at most, often 4
CANARY_RISE = 0.15  # of the win rate of wrong completions, and at least CANARY_SIGMAS standard errors
CANARY_SIGMAS = 3.5  # every canary of a run is another chance of a false alarm


def canary_watch(cfg: RLAIFConfig, judge: Judge | None, run_dir: str | Path) -> Callable[..., dict]:
    """Return f(step, groups) -> metrics, by which the judge compares pairs of known order now and then.

    An endpoint's kept replies count in this run folder alone, where a resumed run asks again."""
    canary = Canary(cfg.run.seed, judge) if judge and cfg.judge.canary_every and dist.is_main() else None

    def watch(step, groups: list) -> dict:
        if canary is None or not step.due(cfg.judge.canary_every):
            return {}
        judge.when = f"{Path(run_dir).resolve()} step {step.number}"
        metrics, judge.when = canary.metrics(groups), ""
        return metrics

    return watch


class CollapseMonitor(Kept):
    """Compares the last steps with the first ones, also over a resume."""
    kept = ("history", "canaries", "best", "said")

    def __init__(self):
        self.history: dict[str, list[float]] = {name: [] for name in WATCHED}
        self.canaries: list[dict] = []
        self.best = 0.0  # greatest solve rate of a window
        self.said: list[str] = []

    def check(self, metrics: dict) -> list[str]:
        """Take in the metrics of a step and return new warnings, each kind once a run.

        Cut completions are said after one window of steps, the canary gap after CANARY_PAIRS pairs, the rest after two
        windows."""
        metrics = metrics | {"problems": metrics["rollout/groups"] + metrics["rollout/dropped_groups"]}
        for name, metric in WATCHED.items():
            value = metrics.get(metric)
            if value is not None and math.isfinite(value):
                self.history[name].append(value)
        steps, problems = len(self.history["problems"]), sum(self.history["problems"][-WINDOW:])
        start, now = ({name: statistics.fmean(values[window]) for name, values in self.history.items() if values}
                      for window in (slice(WINDOW), slice(-WINDOW, None)))
        if (wins := metrics.get("canary/rollout_worse_wins")) is not None:
            # a pair without one of its votes is not counted, without both it is taken off twice: never too many
            pairs = max(1, metrics["canary/rollout_pairs"] - metrics.get("canary/rollout_no_votes", 0))
            self.canaries.append({"pairs": pairs, "wins": wins, "correct": now["correct"], "problems": problems})
        found = {"canary": canary_gap(self.canaries)}
        if steps >= WINDOW:
            self.best = max(self.best, now["correct"])
            signs = signs_of_collapse(start, now, self.best, problems)
            found |= {kind: text for kind, text in signs.items() if kind == "cut" or steps >= 2 * WINDOW}
        new = {kind: text for kind, text in found.items() if text and kind not in self.said}
        self.said += new
        return list(new.values())


def signs_of_collapse(start: dict, now: dict, best: float, problems: int) -> dict[str, str]:
    """Warn of what the means of the first and the last window of steps show."""
    correct, found = f"{100 * now['correct']:.0f}%", {}
    if now.get("entropy", math.inf) < ENTROPY_LEFT * start.get("entropy", math.inf):
        found["entropy"] = (
            f"entropy collapse: it fell from {start['entropy']:.3g} to {now['entropy']:.3g} nats a token, so the "
            "completions of a group become one text. Lower lr, raise clip_high, or set entropy_coef=0.001; the best "
            "checkpoint is kept")
    if now["tokens"] >= LENGTH_GROWN * start["tokens"] and now["correct"] <= start["correct"] + MORE_CORRECT:
        found["length"] = (
            f"length is running away: completions grew from {start['tokens']:.0f} to {now['tokens']:.0f} tokens, but "
            f"{correct} are correct, {100 * start['correct']:.0f}% were at first. Raise brevity_weight, use "
            "overlong=penalty, or look at what the judge likes about long ones")
    if 1 - now["finished"] > CUT_SHARE:
        found["cut"] = (
            f"{100 * (1 - now['finished']):.0f}% of the completions are cut at max_new_tokens and count as wrong. "
            "Raise max_new_tokens, or reward brevity (overlong=penalty)")
    error = (best * (1 - best) / max(1, problems)) ** 0.5  # the completions of a problem go together: they count as one
    if best - now["correct"] > max(LEAST_FALL, FALL_SIGMAS * error):
        found["fall"] = (
            f"the solve rate falls off: {correct} of the completions of the last {WINDOW} steps are correct, "
            f"{100 * best:.0f}% were at its best. Stop here and take the best checkpoint (eval_every keeps it), or go "
            "on with a lower lr or kl_coef=0.01")
    return found


def enough(canaries: list[dict]) -> list[dict]:
    """Return the shortest head that holds CANARY_PAIRS pairs, or []."""
    sums = itertools.accumulate(canary["pairs"] for canary in canaries)
    return next((canaries[:n] for n, pairs in enumerate(sums, 1) if pairs >= CANARY_PAIRS), [])


def canary_gap(canaries: list[dict]) -> str:
    """Warn where the newest canaries' wrong solutions win more often than the first ones', or than the right ones."""
    first = enough(canaries)
    later = canaries[len(first):]
    newest = enough(later[::-1])[::-1] if later else first
    if not newest:
        return ""
    both = (first, newest)
    n_first, n = (sum(c["pairs"] for c in window) for window in both)
    before, wins = (sum(c["wins"] * c["pairs"] for c in window) / sum(c["pairs"] for c in window) for window in both)
    correct_before, correct = (statistics.fmean(c["correct"] for c in window) for window in both)
    mean, pairs = (wins + before) / 2, n * n_first / (n + n_first)
    risen = wins - before > max(CANARY_RISE, CANARY_SIGMAS * (mean * (1 - mean) / pairs) ** 0.5)
    # the windows of `correct` behind the canaries overlap: count the problems of one
    noise = 2 * (2 * correct_before * (1 - correct_before) / max(1, newest[-1]["problems"])) ** 0.5
    rising = risen and correct - correct_before <= max(MORE_CORRECT, noise)
    if not rising and wins - 0.5 <= CANARY_SIGMAS * (0.25 / n) ** 0.5:
        return ""
    change, then = f" ({100 * before:.0f}% of the first {n_first})", f" ({100 * correct_before:.0f}% then)"
    if newest is first:
        change = then = ""
    meaning = ("the policy is learning to please the judge rather than to be correct" if rising else
               "the judge prefers wrong solutions, and a policy that is paid by it will learn to write them")
    return (f"the canary gap opens: judged against correct completions, wrong ones win {100 * wins:.0f}% of the last "
            f"{n} pairs{change}; {100 * correct:.0f}% of all completions are correct{then}. This means that {meaning}. "
            "Stop here and take the best checkpoint (eval_every keeps it), or go on with a stronger judge, "
            "verifier=exact or a lower judge_weight")
