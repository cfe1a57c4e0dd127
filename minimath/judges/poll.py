"""Put questions to a judge and count its votes: for runs, probes and comparisons."""
from collections.abc import Callable

from minimath.core.errors import Interrupted
from minimath.core.stats import wilson
from minimath.judges.base import Asked, Judge, Pair
from minimath.judges.compare import both_orders, won

MOST_FAILURES = 20  # of one call: enough to find the one question of a thousand that fails


def ask(judge: Judge, questions: list[Pair] | list[Asked], advance: Callable[[int], None] = lambda n: None,
        chunk: int = 0, put: Callable | None = None) -> tuple[list, str]:
    """Ask a judge, and return its votes and its last exception in words, or "".

    A judge that raises is said once for each kind of exception; the questions are then asked again in halves, so that
    one that it can't take costs its own vote alone. chunk: questions per call, 0: all; advance(n) follows every n.
    put: judge.grade or judge.grade_all for single solutions, else pairs go to judge.compare."""
    votes, error, failures, size, put = [], "", 0, chunk or max(1, len(questions)), put or judge.compare
    due = [questions[start:start + size] for start in range(0, len(questions), size)][::-1]
    while due:
        part = due.pop()
        try:
            got = list(put(part)) if failures < MOST_FAILURES else [None] * len(part)
            if len(got) != len(part):
                raise ValueError(f"{len(got)} votes for {len(part)} questions")
        except Interrupted:
            raise
        except Exception as problem:  # whatever it is, it is counted and said, and the run goes on
            failures, error = failures + 1, f"{type(problem).__name__}: {problem}"[:300]
            judge.say_once(type(problem).__name__, f"the judge {judge.name} failed ({error}); its questions are asked "
                           "again in smaller batches, and those that fail alone have no vote")
            if len(part) > 1:
                due += [part[len(part) // 2:], part[:len(part) // 2]]
                continue
            got = [None]
        votes += got
        advance(len(part))
    return votes, error


def in_both_orders(pairs: list[Pair]) -> list[Pair]:
    """Turn pairs into two questions each: as it is, and turned round."""
    return [question for pair in pairs for question in (pair, pair._replace(first=pair.second, second=pair.first))]


def tally(votes: list[float | None], soft: bool) -> dict:
    """Compute figures from the votes on `in_both_orders` of some pairs.

    agreement: share of pairs whose first solution wins with both orders together, a tie counting one half, and its 95%
    interval. first_wins: mean of compare.both_orders. position_bias: mean of
    v(i, j) + v(j, i) - 1, above 0 for a judge that likes what stands first. order_conflicts: share of pairs whose
    winner changes with the order. None without a pair that has both votes."""
    pairs = list(zip(votes[::2], votes[1::2], strict=True))
    voted = [pair for pair in pairs if None not in pair]

    def mean(figure: Callable) -> float | None:
        return sum(figure(*pair) for pair in voted) / len(voted) if voted else None

    agreement = mean(won)
    return {"pairs": len(pairs), "voted": len(voted), "no_votes": sum(vote is None for vote in votes),
            "agreement": agreement, "interval": wilson(agreement * len(voted), len(voted)) if voted else None,
            "first_wins": mean(lambda f, b: both_orders(f, b, soft)),
            "position_bias": mean(lambda f, b: f + b - 1.0),
            "order_conflicts": mean(lambda f, b: (f - 0.5) * (b - 0.5) > 0)}


def percent(share: float | None, digits: int = 0) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f}%"


def span(interval: tuple[float, float] | None, form: str = ".0f") -> str:
    return "-" if interval is None else f"{100 * interval[0]:{form}} to {100 * interval[1]:{form}}"

