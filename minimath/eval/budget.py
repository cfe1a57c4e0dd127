"""Give thoughts a budget: at its end the closing tag and the beginning of the answer are put in, and sampling goes on.

Budget forcing, as in s1 (arXiv 2501.19393): what a model knows after N tokens of thought is measured, while a cut at N
counts every thought that is longer as wrong.
"""
import contextlib
from collections.abc import Iterator

from minimath.core.errors import UserError
from minimath.data.sample import Sample
from minimath.data.template import CLOSE
from minimath.rollout.ends import BOX

FORCED = f"\n{CLOSE}\n\nThe final answer is {BOX}"


def limited_stream(engine, budget: int, prompts: list[list[int]], n: int = 1, *, keys=None,
                   skip=()) -> Iterator[list[tuple[int, int, Sample]]]:
    """Stream as Engine.stream does, no thought above `budget` tokens; 0: no limit.

    Those that reach it come last; max_new_tokens holds for the whole. Raises as Engine.stream, and UserError where
    max_new_tokens leaves no room for an answer."""
    if not budget:
        yield from engine.stream(prompts, n, keys=keys, skip=skip)
        return
    keys, longest, waiting = range(len(prompts)) if keys is None else keys, engine.max_new_tokens, {}
    forced = engine.policy.tokenizer(FORCED, add_special_tokens=False)["input_ids"]
    if budget + len(forced) >= longest:
        raise UserError(f"thinking_budget={budget} and {len(forced)} tokens that end the thought leave nothing of "
                        f"max_new_tokens={longest} for the answer: raise that, or lower thinking_budget")
    try:
        engine.max_new_tokens = budget
        with contextlib.closing(engine.stream(prompts, n, keys=keys, skip=skip)) as stream:
            for came in stream:
                waiting |= {(p, s): one for p, s, one in came if not one.finished and one.tokens >= budget}
                yield [(p, s, one) for p, s, one in came if (p, s) not in waiting]
        for put_in in (forced, []):  # into thoughts; an answer just goes on
            begun = {place: one for place, one in waiting.items() if one.cut_thinking == bool(put_in)}
            engine.max_new_tokens = longest - budget - len(put_in)
            places = list(begun)
            with contextlib.closing(engine.stream(  # keys of their own: the same random numbers would come again
                    [prompts[p] + begun[p, s].ids + put_in for p, s in places],
                    keys=[-1 - keys[p] * n - s for p, s in places])) as stream:
                for came in stream:
                    yield [(*places[i], joined(engine, begun[places[i]], put_in, rest)) for i, _, rest in came]
    finally:
        engine.max_new_tokens = longest


def joined(engine, begun: Sample, put_in: list[int], rest: Sample) -> Sample:
    """Make one completion of two; what was put in was not sampled, and has log-prob 0."""
    logp, full = (None if None in (one, other) else [*one, *[0.0] * len(put_in), *other]
                  for one, other in ((begun.logp, rest.logp), (begun.full_logp, rest.full_logp)))
    return engine.sample([*begun.ids, *put_in, *rest.ids], logp, rest.finished, full)
