"""Which lists of candidates to show a judge, and what its first choices say of all of them. numpy only, no judge.

An answer (order, shares) is one question: order (k,) are the candidates in the places they stood in, shares (k,) the
probability that each place is called the best, adding up to 1; 1 and zeros for a single letter, 1/k each for a tie. The
model is Luce's choice (1959; Plackett, Applied Statistics 24, 1975) with an effect of the place,

    log share at place r  =  s_i + b_r + a constant of the question,       i the candidate at r.

Each list is asked in all its rotations, so that every candidate stands once in every place: a Latin square, in which
places cost nothing to tell from candidates. For two candidates that is both orders, and soft votes give what pairs do.
"""
import math

import numpy as np

from minimath.judges.compare import PRIOR, Fit, expected_score, mean_wins
from minimath.judges.rubrics import LETTERS

Answer = tuple[tuple[int, ...], list[float]]
LIST_MAX = len(LETTERS)  # of one question: more are harder to weigh, and six of 4,000 characters nearly fill 8k tokens


def lists_of(n: int) -> list[tuple[int, ...]]:
    """The lists for n candidates: one of all, or from LIST_MAX + 1 on a ring of blocks, of which each list shows two
    neighbours. Every candidate then stands in two lists, and a list that gets no votes leaves the others joined."""
    if n <= LIST_MAX:
        return [tuple(range(n))] if n > 1 else []
    m = math.ceil(n / (LIST_MAX // 2))
    blocks = [tuple(range(n * t // m, n * (t + 1) // m)) for t in range(m)]
    return [block + blocks[(t + 1) % m] for t, block in enumerate(blocks)]


def rotations(listed: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The k orders in which a list is asked; the r-th begins with its r-th candidate."""
    return [listed[r:] + listed[:r] for r in range(len(listed))]


def separable(k: int, answered: list[int]) -> bool:
    """Whether the answers to these rotations of a list of k tell candidates from places. Two rotations that are d apart
    leave only strengths that grow by a constant from each candidate to the d-th after it, and round the circle of the
    list that constant is 0: strengths are free on the cosets of what the distances generate."""
    return bool(answered) and math.gcd(k, *(r - answered[0] for r in answered)) == 1


def fit_lists(n: int, answers: list[Answer], *, soft: bool, prior: float = PRIOR) -> Fit:
    """Strengths s of n candidates; the places' effects b, of each length of list its own, are fitted with them.

    soft: least squares on the log-shares, exact where the model holds, whatever b is. Needs separable lists. Otherwise,
    and where a share is 0, shares are votes: maximum posterior of the multinomial logit, s and b with normal priors of
    precision `prior`. Standard errors are from the inverse Hessian and count a question as one draw; misfit is the root
    mean square of the shares less their expectation.
    """
    blocks = designs(n, answers)
    shares = [np.array(of_one, dtype=float) for _, of_one in answers]
    if soft and answers and all((one > 0).all() for one in shares):
        logs = [np.log(one) for one in shares]
        theta = np.linalg.lstsq(np.concatenate([x - x.mean(0) for x in blocks]),
                                np.concatenate([one - one.mean() for one in logs]), rcond=None)[0]  # the shortest one
    else:
        theta = most_likely(blocks, shares, prior)
    chances = [choice_chances(x @ theta) for x in blocks]
    # (1, ..., 1, 0, ..., 0) is an eigenvector, of value `prior`: without it, errors of the distances to the mean
    variance = np.diag(np.linalg.inv(curvature(blocks, chances, prior)))[:n] - 1 / (prior * max(1, n))
    misfit = float(np.sqrt(np.mean((np.concatenate(shares) - np.concatenate(chances)) ** 2))) if answers else 0.0
    return Fit(theta[:n], np.sqrt(np.maximum(variance, 0.0)), 0.0, misfit)


def designs(n: int, answers: list[Answer]) -> list[np.ndarray]:
    """Of each answer the matrix X (k, n + number of b) with s_i + b_r = X @ theta, theta being s and then every b."""
    start, width = {}, n
    for k in sorted({len(order) for order, _ in answers}):
        start[k], width = width, width + k
    blocks = []
    for order, _ in answers:
        k = len(order)
        x = np.zeros((k, width))
        x[np.arange(k), list(order)] = x[np.arange(k), start[k] + np.arange(k)] = 1
        blocks.append(x)
    return blocks or [np.zeros((0, n))]


def most_likely(blocks: list[np.ndarray], shares: list[np.ndarray], prior: float) -> np.ndarray:
    """theta of the maximum posterior of the multinomial logit, by Newton's method."""
    theta = np.zeros(blocks[0].shape[1])
    for _ in range(500):
        chances = [choice_chances(x @ theta) for x in blocks]
        slope = -prior * theta
        for x, one, chance in zip(blocks, shares, chances, strict=False):  # no shares, and one empty block: no answers
            slope = slope + x.T @ (one - chance)
        step = np.linalg.solve(curvature(blocks, chances, prior), slope)
        longest = np.abs(step).max(initial=1e-12)
        theta = theta + step * min(1.0, 2.0 / longest)  # no leap on the flat ends
        if longest < 1e-9:
            break
    return theta


def choice_chances(lift: np.ndarray) -> np.ndarray:
    """Softmax (k,)."""
    odds = np.exp(lift - lift.max(initial=-np.inf))
    return odds / odds.sum()


def curvature(blocks: list[np.ndarray], chances: list[np.ndarray], prior: float) -> np.ndarray:
    """Hessian of the negative log posterior."""
    out = prior * np.eye(blocks[0].shape[1])
    for x, chance in zip(blocks, chances, strict=True):
        spread = x - chance @ x
        out += spread.T @ (chance[:, None] * spread)
    return out


def list_wins(n: int, answers: list[Answer], *, soft: bool,
              copies: list[int]) -> tuple[list[float | None], Fit]:
    """(w, fit): w_i is the mean over the others of P(i is chosen of the two), None for those in no list. Candidates
    that no chain of lists joins drop out of each other's means; copies as in compare.win_probabilities."""
    fit = fit_lists(n, answers, soft=soft)
    group = np.arange(n)
    for order, _ in answers:
        group[np.isin(group, group[list(order)])] = group[order[0]]
    return mean_wins(expected_score(fit.strengths[:, None] - fit.strengths[None]), group, copies), fit


def place_lean(answers: list[Answer]) -> float:
    """What the places alone are worth in the answers to all rotations of a list: the mean of 1 for the first place, -1
    for the last, evenly spaced between. 0: no lean; 1: always the first; of two places it is the bias of pairs."""
    leans = [np.dot(shares, np.linspace(1, -1, len(shares))) for _, shares in answers]
    return float(np.mean(leans))


def choices_differ(answers: list[Answer]) -> bool:
    """Whether the first choice changes with the rotation; answers with two at the top choose none."""
    chosen = {order[int(np.argmax(shares))] for order, shares in answers
              if sum(share == max(shares) for share in shares) == 1}
    return len(chosen) > 1
