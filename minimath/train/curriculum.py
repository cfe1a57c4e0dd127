"""Which problems a step of RL draws: in the order of the data, or where there is something to learn.

A group teaches only when it holds right and wrong completions (its advantages are 0 otherwise). Off (the default), the
draws are batch.stream_indices, bit for bit. Otherwise a running solve rate per problem decides:

  min_solve_rate / max_solve_rate  problems measured outside the band rest, and are measured again after REST epochs'
                                   worth of draws: the policy moves, and a problem that was too hard may not stay so
  curriculum=learnable             draws without replacement in a step, in proportion to the chance that the next group
                                   holds both right and wrong ones (`chance_of_both`; 1 - 2 / (G + 1) when never drawn)

All state is in one json-able dict that the loop keeps in its checkpoint; draws depend on it, the seed and the cursor.
It is kept when the curriculum is off, too: a resume may switch it on.
"""
import numpy as np

from minimath.data.batch import stream_indices

MEMORY = 0.8  # what a visit leaves of the counts before it: an exponential mean over about the last five groups
REST = 3


def new_curriculum() -> dict:
    """place: position in the stream of the data, ahead of the cursor by the problems that were passed over. problems:
    str(index) -> [right, completions (both decayed), cursor of the last draw]; json has no whole numbers as keys."""
    return {"place": 0, "problems": {}}


def is_on(cfg) -> bool:
    """Whether cfg asks for anything but the order of the data."""
    return cfg.curriculum != "none" or cfg.min_solve_rate > 0 or cfg.max_solve_rate < 1


def draw(cfg, state: dict, cursor: int, count: int, size: int, taken: list[int]) -> list[int]:
    """Indices (count,) of the next problems out of `size`. state: of new_curriculum, `place` is advanced; taken:
    drawn in this step before, not drawn again while there are others; cursor: draws of the run so far.
    count <= size."""
    if not is_on(cfg):
        return stream_indices(cursor, count, size, cfg.run.seed)
    before = set(taken)
    ready = [i for i in range(size) if i not in before and not rests(cfg, state, i, cursor, size)]
    if len(ready) < count:  # too few: those that have rested longest come back early
        others = sorted(set(range(size)) - set(ready), key=lambda i: (i in before, last_drawn(state, i), i))
        ready += others[:count - len(ready)]
    if cfg.curriculum == "learnable":
        return weighted(cfg, state, ready, cursor, count)
    state["place"] = max(state["place"], cursor)  # switched on by a resume, it goes on where the run was
    return next_in_stream(cfg, state, set(ready), count, size)


def next_in_stream(cfg, state: dict, ready: set[int], count: int, size: int) -> list[int]:
    """The next `count` of the ready problems (there are as many) in the order of the data, from state["place"] on."""
    chosen: list[int] = []
    while len(chosen) < count:
        [index] = stream_indices(state["place"], 1, size, cfg.run.seed)
        state["place"] += 1
        if index in ready and index not in chosen:
            chosen.append(index)
    return chosen


def weighted(cfg, state: dict, ready: list[int], cursor: int, count: int) -> list[int]:
    """`count` of the ready problems without replacement, by weight: the smallest of -log(u) / w (Efraimidis and
    Spirakis 2006), u seeded by (seed, cursor)."""
    weights = np.array([chance_of_both(*counts(state, i), cfg.group_size) for i in ready])
    u = np.random.default_rng([cfg.run.seed, cursor]).random(len(ready))
    order = np.argsort(-np.log1p(-u) / weights, kind="stable")  # 1 - u is in (0, 1]
    return [ready[i] for i in order[:count]]


def chance_of_both(right: float, seen: float, group: int) -> float:
    """Chance that a group of `group` completions holds right and wrong ones, when `right` of `seen` were right so far.

    The solve rate is Beta(1 + right, 1 + wrong) then (uniform before anything is seen), so that the chance of all
    right is prod_k (1 + right + k) / (2 + seen + k), k = 0 .. group - 1, that of all wrong likewise: beta-binomial.
    """
    k = np.arange(group)
    every, none = ((1 + n + k) / (2 + seen + k) for n in (right, seen - right))
    return float(1 - every.prod() - none.prod())


def record(state: dict, index: int, right: int, group: int, cursor: int) -> None:
    """Take in the group of one problem: `right` of its `group` completions; cursor: the place of its draw."""
    before, seen = counts(state, index)
    state["problems"][str(index)] = [MEMORY * before + right, MEMORY * seen + group, cursor]


def counts(state: dict, index: int) -> tuple[float, float]:
    """(right, completions) of a problem, decayed; (0, 0) when it was never drawn."""
    right, seen, _ = state["problems"].get(str(index), (0.0, 0.0, -1))
    return right, seen


def last_drawn(state: dict, index: int) -> int:
    return state["problems"].get(str(index), (0.0, 0.0, -1))[2]


def rests(cfg, state: dict, index: int, cursor: int, size: int) -> bool:
    """Whether the running solve rate is outside the band and the last draw less than REST epochs ago."""
    right, seen = counts(state, index)
    inside = not seen or cfg.min_solve_rate <= right / seen <= cfg.max_solve_rate
    return not inside and cursor - last_drawn(state, index) < REST * size


def curriculum_facts(cfg, state: dict, cursor: int, size: int) -> dict:
    """Metrics: problems seen so far, their mean running solve rate, and those that rest. {} when off."""
    if not is_on(cfg):
        return {}
    rates = [right / seen for right, seen, _ in state["problems"].values()]
    resting = sum(rests(cfg, state, int(i), cursor, size) for i in state["problems"])
    return {"problems_seen": len(rates), "problems_resting": resting, "solve_rate": sum(rates) / max(1, len(rates))}


def copy_of(state: dict) -> dict:
    """A copy to work on (`record` replaces the lists inside): a rollout that is interrupted must leave no trace."""
    return {**state, "problems": dict(state["problems"])}
