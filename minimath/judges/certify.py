"""What judges say of solutions whose faults are known, and how much of it is right."""
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from minimath.core.stats import bootstrap, wilson
from minimath.grading.steps import check_steps
from minimath.judges.base import Judge, Pair, better
from minimath.judges.calibrate import brier, like_lengths, reliability
from minimath.judges.compare import ask, ask_both, tally, won
from minimath.judges.known import HIDDEN, NEEDLESS, SOUND, UNREAD, WRONG, KnownRows

DRAWS = 1000  # of a bootstrap


@dataclass
class Answers:
    """What one judge said of known solutions.

    votes: on each pair in both orders. scores: of each solution, whatever sorts, None: none; graded: they are
    probabilities. wrong_steps: the first step of each that it finds wrong, -1: none."""
    name: str
    votes: list[tuple]
    soft: bool = False
    scores: list | None = None
    graded: bool = False
    wrong_steps: list[int | None] | None = None
    error: str = ""


def by_scores(name: str, known: KnownRows, scores: list, graded: bool = False, **more) -> Answers:
    """Let scores decide pairs: grades as in a run, others alone."""
    votes = []
    for _, i, j in known.pairs:
        vote = better(scores[i], scores[j], *(known.solutions[n].solution.tokens for n in (i, j))) if graded else \
            won(scores[i], scores[j])
        votes.append((vote, None if vote is None else 1.0 - vote))
    return Answers(name, votes, graded, scores, graded, **more)


def length_alone(known: KnownRows) -> Answers:
    """Hold the shorter solution for the better one: fewer words and signs, then letters."""
    return by_scores("length alone", known, [(-each.solution.tokens, -len(each.solution.text))
                                             for each in known.solutions])


def heuristic(known: KnownRows) -> Answers:
    """Score by the share of right arithmetic steps, then by length: no answer is known."""
    scores, wrong_steps = [], []
    for each in known.solutions:
        right, total = each.solution.steps
        scores.append((right / total if total else 0.0, -each.solution.tokens))
        wrong_steps.append(first([not count.sound for count in map(check_steps, each.steps)]))
    return by_scores("heuristic", known, scores, wrong_steps=wrong_steps)


def first(found: Iterable[bool]) -> int:
    """The index of the first True, -1 for none."""
    return next((k for k, wrong in enumerate(found) if wrong), -1)


def ask_known(judge: Judge, known: KnownRows, name: str, advance: Callable[[int], None] = lambda n: None) -> Answers:
    """Ask a judge: of form pair about the pairs, of another for grades and steps.

    A solution that stands in several rows is asked about once. advance: 2 per pair, or 1 per solution."""
    if judge.form == "pair":
        pairs = [Pair(known.solutions[i].problem, known.solutions[i].solution, known.solutions[j].solution)
                 for _, i, j in known.pairs]
        votes, error = ask_both(judge, [pair.both() for pair in pairs], advance)
        return Answers(name, votes, judge.soft, error=error)
    questions = list(dict.fromkeys(each.question for each in known.solutions))
    told, error = ask(judge, questions, advance, chunk=32, put=judge.grade_all)
    told = dict(zip(questions, told, strict=True))
    grades, of_steps = zip(*(told[each.question] or (None, None) for each in known.solutions))
    firsts = [None if steps is None else first(p < 0.5 for p in steps) for steps in of_steps]
    return by_scores(name, known, [None if p != p else p for p in grades], graded=True,  # NaN
                     wrong_steps=firsts, error=error)


def questions_of(judge: Judge, known: KnownRows) -> int:
    """Count what `ask_known` asks."""
    return 2 * len(known.pairs) if judge.form == "pair" else len({each.question for each in known.solutions})


def figures_of(answers: Answers, length: Answers, known: KnownRows, seed: int = 0) -> dict:
    """Compute all figures of one judge's answers, beside those of length alone.

    pairs: `pair_figures` by kind. auc: `auc_figures` by kind of fault, where there are scores. process:
    `process_figures` by source, where it names wrong steps. calibration: `calibration_figures`, of grades."""
    kinds = in_order(kind for kind, _, _ in known.pairs)
    report = {"pairs": {kind: pair_figures(answers, length, known, kind, seed) for kind in kinds},
              "error": answers.error}
    if answers.scores:
        found = {kind: auc_figures(answers, length, known, kind, seed) for kind in in_order(known.kinds())}
        report["auc"] = {kind: figures for kind, figures in found.items() if figures}
    if answers.wrong_steps:
        report["process"] = process_figures(answers, known)
    if answers.graded:
        report["calibration"] = calibration_figures(answers, known)
    return report


def in_order(kinds: Iterable[str]) -> list[str]:
    """Sort kinds of fault, what a judge behind the verifier decides first."""
    order = [HIDDEN, NEEDLESS, WRONG, UNREAD]
    return sorted(set(kinds) - {SOUND}, key=lambda kind: (order.index(kind) if kind in order else len(order), kind))


def pair_figures(answers: Answers, length: Answers, known: KnownRows, kind: str, seed: int) -> dict:
    """Compute compare.tally of the pairs of a kind, and more.

    even: of pairs of like lengths, the share in which the better one has the higher score (or more votes), ties one
    half. length, gain: as in `auc_figures`, of agreement; None without votes."""
    of_kind = [n for n, pair in enumerate(known.pairs) if pair[0] == kind]
    figures, base = (tally([one.votes[n] for n in of_kind], one.soft) for one in (answers, length))
    base, even, gaps = base["agreement"], [], {}
    turned = base < 0.5 and answers is not length
    for n in (n for n in of_kind if None not in answers.votes[n]):
        _, i, j = known.pairs[n]
        mine, theirs = won(*answers.votes[n]), won(*length.votes[n])
        if like_lengths(*(known.solutions[k].solution.tokens for k in (i, j))):
            even.append(won(answers.scores[i], answers.scores[j]) if answers.scores else mine)
        gaps.setdefault(known.solutions[i].problem, []).append(mine - (1 - theirs if turned else theirs))
    means = [sum(gap) / len(gap) for gap in gaps.values()]
    return figures | {
        "even": {"pairs": len(even), "share": sum(even) / len(even) if even else None,
                 "interval": wilson(sum(even), len(even)) if even else None},
        "length": 1 - base if turned else base,
        "gain": [sum(means) / len(means), *bootstrap(means, seed)] if means and answers is not length else None}


def auc_figures(answers: Answers, length: Answers, known: KnownRows, kind: str, seed: int) -> dict | None:
    """Compute the AUC of sound solutions against those of a kind, within each source.

    length: that of length alone, as shorter or as longer is better, whichever is higher. gain: what is above it, and
    its 95% interval by bootstrap over problems, as `interval`. None where no source has both."""
    rows = [n for n, each in enumerate(known.solutions)
            if each.kind in (SOUND, kind) and answers.scores[n] is not None]
    sources = [{known.solutions[n].source for n in rows if known.solutions[n].kind == side} for side in (SOUND, kind)]
    rows = [n for n in rows if known.solutions[n].source in sources[0] & sources[1]]
    if not rows:
        return None
    sound = np.array([known.solutions[n].kind == SOUND for n in rows])
    strata, problems = (np.unique([getattr(known.solutions[n], name) for n in rows], return_inverse=True)[1]
                        for name in ("source", "problem"))
    mine, theirs = (auc_draws([one.scores[n] for n in rows], sound, strata, problems, seed)
                    for one in (answers, length))
    best = 1 - theirs if theirs[0] < 0.5 and answers is not length else theirs
    gap = mine - best
    return {"sound": int(sound.sum()), "faulty": int((~sound).sum()), "auc": float(mine[0]), "interval": span95(mine),
            "length": float(best[0]), "gain": None if answers is length else [float(gap[0]), *span95(gap)]}


def span95(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(draws[1:], [2.5, 97.5])
    return float(low), float(high)


def auc_draws(scores: list, sound: np.ndarray, strata: np.ndarray, problems: np.ndarray, seed: int) -> np.ndarray:
    """Compute the AUC of scores, ties one half, and of DRAWS resamples of the problems.

    Only solutions of one stratum are compared. Returns (1 + DRAWS,); NaN for a draw that lacks either side."""
    rank = {score: n for n, score in enumerate(sorted(set(scores)))}
    places = np.array([rank[score] for score in scores]) + len(rank) * strata  # (N,): the strata one after the other
    _, begins, places = np.unique(places, return_index=True, return_inverse=True)
    firsts = strata[begins]  # the stratum of each place
    rng, count, out = np.random.default_rng(seed), problems.max() + 1, []
    for draw in range(DRAWS + 1):
        weight = np.bincount(rng.integers(0, count, count), minlength=count)[problems] if draw else np.ones(len(scores))
        good, bad = (np.bincount(places, weight * side, len(firsts)) for side in (sound, ~sound))
        good_of, bad_of = (np.bincount(firsts, side) for side in (good, bad))
        below = np.cumsum(bad) - bad / 2 - (np.cumsum(bad_of) - bad_of)[firsts]
        compared = (good_of * bad_of).sum()
        out.append((good * below).sum() / compared if compared else np.nan)
    return np.array(out)


def process_figures(answers: Answers, known: KnownRows) -> dict[str, dict]:
    """Compute ProcessBench's figures of each source: is the first wrong step found?

    erroneous: share of faulty rows whose first wrong step is named exactly; correct: share of sound rows in which none
    is; f1: their harmonic mean, None without both kinds. A row without an answer counts as missed."""
    hits: dict[str, dict[bool, list[bool]]] = {}
    for each, said in zip(known.solutions, answers.wrong_steps, strict=True):
        if each.wrong_step is not None:
            hits.setdefault(each.source, {True: [], False: []})[each.wrong_step >= 0].append(said == each.wrong_step)
    report = {}
    for source, sides in hits.items():
        faulty, sound = (sum(side) / len(side) if side else None for side in (sides[True], sides[False]))
        f1 = None if None in (faulty, sound) else 2 * faulty * sound / (faulty + sound) if faulty + sound else 0.0
        report[source] = {"faulty_rows": len(sides[True]), "erroneous": faulty, "sound_rows": len(sides[False]),
                          "correct": sound, "f1": f1}
    return report


def calibration_figures(answers: Answers, known: KnownRows) -> dict | None:
    """Hold grades against soundness; needless steps are no fault here and none counts.

    constant: the Brier score of one grade for all, the share that is sound."""
    graded = {each.question: (grade, each.kind == SOUND) for each, grade in
              zip(known.solutions, answers.scores, strict=True)
              if grade is not None and each.kind not in (NEEDLESS, "")}
    if not graded:
        return None
    grades, sound = zip(*graded.values())
    share = sum(sound) / len(sound)
    return {"solutions": len(sound), "sound": share, "brier": brier(grades, sound), "constant": share * (1 - share),
            "reliability": reliability(grades, sound)}
