"""The model in training as a judge of its own solutions: adapter off, or a judge's adapter on.

Verdicts are probabilities of one forward; nothing is generated. The prompts of a group differ in little: they are laid
out as a tree, every common beginning once, in one sequence under a block mask (each token sees the tokens before it in
its own prompt). The verdicts are those of the prompts computed apart.
"""
import bisect
import dataclasses
import math
from collections.abc import Callable
from os.path import commonprefix
from typing import NamedTuple

import torch

from minimath.config.schema import JudgeOptions
from minimath.core import interrupt
from minimath.core.errors import is_out_of_memory
from minimath.core.run_folder import find_adapter
from minimath.data.batch import collate_padded, like_lengths, tail_length
from minimath.data.chat import Encoded
from minimath.judges.base import Asked, Judge, Pair, asked, better
from minimath.judges.card import JUDGE, JudgeCard, read_card
from minimath.judges.rows import LETTERS, YES_NO, Reader, verdict_ids
from minimath.judges.rubrics import load_rubric
from minimath.kernels import linear_logp
from minimath.models import forward
from minimath.models.attention import Segment
from minimath.models.block_attention import on_device
from minimath.models.forward import base_causal_lm, hidden_states
from minimath.models.memory import give_back
from minimath.models.policy import Policy
from minimath.models.prefix import EAGER_TOKENS, LEAST_SAVED

# Of one tree on a card. A CPU computes its T^2 attention scores, most of them between tokens that do not see each
# other: there, as under eager attention, 1,024 took 0.8 of the time for grades, 0.9 for pairs (SmolLM2-135M)
TREE_TOKENS = 2048


class Question(NamedTuple):
    """A prompt as tokens, and which log-probs are asked: (place, token) of what follows the place."""
    ids: list[int]
    asks: list[tuple[int, int]]


class SelfJudge(Judge):
    """The judge that is the policy's model, with an adapter of its own or none.

    form=pair: a vote is P(A) + P(TIE) / 2 among the three verdicts, of the first token of the reply. single: a grade is
    P(Yes) of Yes and No after the end of the solution, calibrated; steps: the least of those after its steps and its
    end. counts: prompts, prompt_tokens, computed_tokens (fewer, by what is shared), too_long (for the model; no vote).
    """
    name, soft = "self", True

    def __init__(self, options: JudgeOptions, policy: Policy, *, micro_batch_tokens: int = 4096,
                 say: Callable[[str], None] = print, card: JudgeCard | None = None):
        """Load the judge's adapter, if any, and find the verdict tokens. Raises UserError.

        card: the policy's own adapter is a judge, which this tells of."""
        super().__init__(options, say=say)
        self.adapter, self.card = "default" if card else None, card or JudgeCard()
        if options.adapter:
            folder = find_adapter(options.adapter)
            self.adapter, self.card = JUDGE, read_card(folder)
            policy.add_adapter(folder, JUDGE)
        policy = dataclasses.replace(policy, prompt=self.card.prompt_options(policy.prompt))
        rubric = self.card.rubric or load_rubric(options.rubric)
        self.form = self.card.form_of(options.form)
        self.by_rubric = self.form == "pair" and not self.card.rubric
        self.model, self.micro_batch_tokens = policy.model, micro_batch_tokens
        self.reader = Reader(policy, rubric)
        self.verdicts = verdict_ids(policy.tokenizer, LETTERS if self.form == "pair" else YES_NO)
        config = base_causal_lm(self.model).config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None) or 1 << 30

    prompt = property(lambda self: self.reader.prompt, lambda self, fill: setattr(self.reader, "prompt", fill),
                      doc="What fills the rubric: judge_prompt, or bare_prompt without its defences.")

    def compare(self, pairs: list[Pair]) -> list[float | None]:
        """Return a probability for each pair; None for a prompt beyond the context.

        Of grades: `better`; every solution is read once."""
        if self.form == "pair":
            found = self.logps([Question(ids, [(len(ids) - 1, verdict) for verdict in self.verdicts])
                                for ids in map(self.reader.pair, pairs)])
            chances = [None if each is None else each.softmax(0).tolist() for each in found]
            votes = [None if each is None else each[0] + each[2] / 2 for each in chances]
            return [None if vote != vote else vote for vote in votes]  # NaN
        texts = list(dict.fromkeys((pair.problem, s.text) for pair in pairs for s in (pair.first, pair.second)))
        grades = dict(zip(texts, self.grade([asked(*text) for text in texts]), strict=True))
        return [better(grades[p, a.text], grades[p, b.text], a.tokens, b.tokens) for p, a, b, *_ in pairs]

    def grade_all(self, questions: list[Asked]) -> list[tuple[float | None, list[float] | None]]:
        """Return the grade of each solution and those of its steps, from one forward."""
        found = []
        for signs in self.signs(questions):
            p = [self.card.calibration.probability(*each) for each in signs or [(math.nan, math.nan)]]
            lost = any(map(math.isnan, p))
            found.append((None, None) if lost else (min(p) if self.form == "steps" else p[-1], p[:-1]))
        return found

    def signs(self, questions: list[Asked]) -> list[list[tuple[float, float]] | None]:
        """Return what speaks for each solution, after each step and after the end.

        log P(Yes) - log P(No), and the log-prob of all numbers and signs of arithmetic so far, as the judge would write
        them; after the end of a solution without any NaN."""
        readings = [self.reader.read(question) for question in questions]
        found = self.logps([Question(r.ids, [(end, verdict) for end in r.ends for verdict in self.verdicts]
                                     + [(place - 1, r.ids[place]) for place in r.numbers]) for r in readings])
        signs = []
        for reading, logp in zip(readings, found, strict=True):
            if logp is not None:
                yes, no = logp[:2 * len(reading.ends)].view(-1, 2).T
                sums = [0.0, *logp[2 * len(reading.ends):].cumsum(0).tolist()]
                written = [sums[bisect.bisect(reading.numbers, end)] for end in reading.ends]
                written[-1] = written[-1] if reading.numbers else math.nan
                logp = list(zip((yes - no).tolist(), written, strict=True))
            signs.append(logp)
        return signs

    def logps(self, readings: list[Question]) -> list[torch.Tensor | None]:
        """Compute the log-probs that each asks for; None beyond the context."""
        fitting = [i for i, reading in enumerate(readings) if len(reading.ids) <= self.context]
        found, computed = self._in_memory([readings[i] for i in fitting])
        self.counts.update(prompts=len(readings), prompt_tokens=sum(len(r.ids) for r in readings),
                           computed_tokens=computed, too_long=len(readings) - len(fitting))
        found = dict(zip(fitting, found, strict=True))
        return [found.get(i) for i in range(len(readings))]

    def _in_memory(self, readings: list[Question]) -> tuple[list[torch.Tensor], int]:
        """Compute log-probs and count tokens, in smaller passes when memory runs out."""
        passes, tree, computed = plan_passes(self.model, [r.ids for r in readings], self.micro_batch_tokens)
        try:
            with forward.inference(self.model), forward.adapter_named(self.model, self.adapter):
                return verdict_logps(self.model, readings, passes, tree), computed
        except (RuntimeError, MemoryError) as error:
            shared = [size for rows, size in passes if len(rows) > 1]
            if not shared or not is_out_of_memory(error):
                raise
        # only here, where the exception no longer holds the activations of the failed pass
        self.micro_batch_tokens = max(shared) // 2
        give_back()
        self.say_once("memory", "the judge self ran out of memory: from now on its passes are smaller, which gives the "
                      "same votes")
        return self._in_memory(readings)


def plan_passes(model, prompts: list[list[int]], micro_batch_tokens: int) -> tuple[list, bool, int]:
    """Choose trees where they save enough and the model takes their mask, else rows.

    Returns the passes, each (indices of prompts, tokens with padding), whether they are trees, and all tokens without
    padding. micro_batch_tokens bounds a pass; a longer prompt goes alone."""
    whole = sum(map(len, prompts))
    base = base_causal_lm(model)
    eager = base.config.get_text_config()._attn_implementation == "eager"
    most = EAGER_TOKENS if eager or base.device.type == "cpu" else TREE_TOKENS
    packs = tree_packs(prompts, min(micro_batch_tokens, most))
    computed = sum(size for _, size in packs)
    if computed <= (1 - LEAST_SAVED) * whole and takes_trees(model, max(map(len, prompts), default=0)):
        return packs, True, computed
    rows = like_lengths([len(ids) for ids in prompts], micro_batch_tokens)
    return [(batch, len(batch) * len(prompts[batch[0]])) for batch in rows], False, whole


def takes_trees(model, longest: int) -> bool:
    """Tell whether attention takes what a tree's tokens see, by a mask or by rows: no short window, either."""
    window, on_cpu = forward.sliding_window(model), base_causal_lm(model).device.type == "cpu"
    takes = forward.takes_mask(model) or not on_cpu and forward.takes_rows(model)
    return takes and not (window and window < longest)


def tree_packs(prompts: list[list[int]], limit: int) -> list[tuple[list[int], int]]:
    """Pack prompts, sorted, into trees of at most `limit` tokens; with those tokens."""
    packs, last = [], []
    for index in sorted(range(len(prompts)), key=lambda i: prompts[i]):
        more = len(prompts[index]) - len(commonprefix([last, prompts[index]]))
        if packs and packs[-1][1] + more <= limit:
            packs[-1] = ([*packs[-1][0], index], packs[-1][1] + more)
        else:
            packs.append(([index], len(prompts[index])))
        last = prompts[index]
    return packs


def verdict_logps(model, questions: list[Question], passes: list, tree: bool) -> list[torch.Tensor]:
    """Compute the log-probs that each question asks for, (asks,) float64 on the CPU."""
    lm_head, order, logps = forward.head(model), [i for rows, _ in passes for i in rows], []
    for rows, _ in passes:
        interrupt.check()
        chosen = [questions[i] for i in rows]
        states = (tree_states if tree else row_states)(model, chosen)  # (M, D)
        tokens = on_device(torch.tensor([token for each in chosen for _, token in each.asks]), states.device)  # (M,)
        logps.append(linear_logp(states, lm_head.weight, tokens, rows=torch.arange(len(tokens), device=states.device),
                                 **lm_head.kernel_args()))
    if not logps:
        return []
    parts = torch.cat(logps).cpu().double().split([len(questions[i].asks) for i in order])  # one read
    return [part for _, part in sorted(zip(order, parts, strict=True), key=lambda each: each[0])]


def row_states(model, questions: list[Question]) -> torch.Tensor:
    """Compute the final hidden states at the places of rows, right-padded: M, D."""
    batch = collate_padded([Encoded(each.ids, [], False, []) for each in questions], pad_id=0)
    places = torch.tensor([start + place for (start, _), each in zip(batch["rows"], questions)
                           for place, _ in each.asks])
    input_ids, mask, places = (on_device(each, base_causal_lm(model).device)
                               for each in (batch["input_ids"], batch["attention_mask"], places))
    return hidden_states(model, input_ids, attention_mask=mask, rows=batch["rows"]).flatten(0, 1)[places]


def tree_states(model, questions: list[Question]) -> torch.Tensor:
    """Compute the final hidden states at the places of prompts in one tree.

    questions: sorted by their tokens. Returns (M, D)."""
    ids, position, places, path, branches, last = [], [], [], [], [], []
    for prompt, asks in questions:
        common = len(commonprefix([last, prompt]))
        if len(prompt) > common:  # else it is the last one, or its beginning
            branches.append(Segment(len(ids), len(prompt) - common, path[:common]))
        path = path[:common] + list(range(len(ids), len(ids) + len(prompt) - common))
        ids += prompt[common:]
        position += range(common, len(prompt))
        places += [path[place] for place, _ in asks]
        last = prompt
    device = base_causal_lm(model).device
    tail = tail_length(len(ids), TREE_TOKENS) if device.type == "cuda" else 0
    ids, position = ids + [0] * tail, position + list(range(tail))
    ids, position, places = (on_device(torch.tensor(values), device) for values in (ids, position, places))
    return hidden_states(model, ids[None], position_ids=position[None], rows=branches)[0].index_select(0, places)
