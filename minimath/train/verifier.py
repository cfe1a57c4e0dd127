"""What decides correct or wrong: an answer of the data, the group, a judge, nothing, or the user's own function."""
import contextlib
import math
import re
import time
from collections import Counter

from minimath.config.options import as_number, user_function
from minimath.config.schema import BY_JUDGE
from minimath.core import dist
from minimath.core.errors import UserError
from minimath.data.examples import Example
from minimath.data.sample import Group, Sample
from minimath.grading.answer import MAX_ANSWER_CHARS, AnswerChecker, final_answer
from minimath.grading.typeset import key, typeset
from minimath.judges.base import Asked, Judge, asked
from minimath.judges.compare import ask

NEEDS_ANSWER, BY_VOTES = ("exact", "regex"), ("majority", "majority+steps")
LABEL_FREE = (*BY_VOTES, *BY_JUDGE)
# Of a group with 64 answers of different wording: with all others, that were 2,016 comparisons of up to 2 s each
MOST_COMPARED = 8  # answers, those with most votes first, that one of another wording is compared with
MOST_LATE = 4      # comparisons of a group that run out of time; after them only the wording counts


def verifier_columns(verifier) -> tuple[str, ...]:
    """What a row of the data must have for this verifier."""
    return ("answer",) if verifier in NEEDS_ANSWER else ()


class Verifier(contextlib.AbstractContextManager):
    """Marks the samples of a group as correct or wrong.

      exact: the final answer equals the reference answer; of a completion that was cut only a closed box is one
      regex: the final answer matches the reference answer, a regular expression, from end to end, within a time limit
      majority: the final answer is that of most samples of the group, of at least majority_share of all of them and
        the only largest one (TTRL, arXiv 2504.16084)
      majority+steps: as majority, of the samples in which every equation holds; the others neither vote nor count
      judge: it finished, has an answer, and the judge's grade is at least 1/2
      majority+judge: as majority, with the grades as votes, 1/2 for one that is missing; a sample without an answer
        adds to all votes alone
      none: every completion that finished is correct, and judge and brevity alone speak
      python:module.fn, or a callable: fn(text, example) -> bool, or a score in [0, 1] of which 0.5 and above is
        correct; a completion that was cut has not answered and is wrong

    Where no answer wins, or a grade that verifier=judge needs is missing, the group is not `decided`: none of its
    samples is correct, and nothing is learnt from it. Each process marks its own groups, with its own judge.

    Raises UserError for a function that can't be loaded, and for an answer of `examples` that is no pattern; on
    entering, for a judge that is missing or grades nothing; `mark` raises it for a bad result, and for a judge that is
    down under judge_fallback=stop."""

    def __init__(self, verifier, examples: list[Example] = (), *, judge: Judge | None = None,
                 majority_share: float = 0.5):
        self.kind, self.checker, self.judge, self.majority_share = verifier, AnswerChecker(), judge, majority_share
        self.sums = Counter()  # since the last metrics()
        self.fn = self.name = None
        if verifier not in (*NEEDS_ANSWER, *LABEL_FREE, "none"):
            self.fn, self.name = user_function(verifier, "verifier")
        for example in examples if verifier == "regex" else ():
            answer_pattern(example)

    def __enter__(self):
        if self.kind in BY_JUDGE and (self.judge is None or self.judge.form not in ("single", "steps")):
            has = f"judge={self.judge.name} compares pairs" if self.judge else "there is none"
            raise UserError(f"verifier={self.kind} needs a judge that grades single solutions, but {has}: train one by "
                            "`minimath judge train`, and set judge=self judge_adapter=RUN judge_form=single")
        return self

    def __exit__(self, *error):
        return self.checker.__exit__(*error)

    def mark(self, groups: list[Group]) -> None:
        """Set `correct` of every sample, and `decided` of every group."""
        if self.kind in LABEL_FREE:
            return self.mark_without_labels(groups)
        for group in groups:
            for sample in group.samples:
                sample.correct = self.verdict(sample, group.example)

    def verdict(self, sample: Sample, example: Example) -> bool:
        if sample.cut_thinking and self.kind in NEEDS_ANSWER:
            return False
        if self.kind == "exact":
            return self.checker.check(sample.text, example.answer, sample.finished)
        if self.kind == "regex":
            return self.checker.matches(sample.text, answer_pattern(example), sample.finished)
        if self.kind == "none" or not sample.finished:
            return sample.finished
        try:
            value = self.fn(sample.text, example)
        except Exception as error:  # any: it is the user's code, and the message must say whose
            raise UserError(f"verifier={self.name} raised {type(error).__name__}: {error}") from error
        number = as_number(value)
        if number is None or not 0 <= number <= 1:
            raise UserError(f"verifier={self.name} returned {value!r}; it must return a bool or a number from 0 to 1")
        return number >= 0.5

    def mark_without_labels(self, groups: list[Group]) -> None:
        answers = [[answer_of(sample) for sample in group.samples] for group in groups]
        grades = self.grades(groups, answers)
        for group, own, of_group in zip(groups, answers, grades, strict=True):
            if self.kind == "judge":
                correct = [sample.finished and bool(answer) for sample, answer in zip(group.samples, own, strict=True)]
                group.decided = not any(may and grade is None for may, grade in zip(correct, of_group, strict=True))
                correct = [may and group.decided and grade >= 0.5 for may, grade in zip(correct, of_group, strict=True)]
            else:
                winner, share = self.vote(own, self.weights(group, of_group))
                self.sums["share"] += share
                group.decided, correct = bool(winner), [i in winner for i in range(len(own))]
            for sample, is_correct in zip(group.samples, correct, strict=True):
                sample.correct = is_correct
            self.count(group, own)

    def weights(self, group: Group, grades: list[float | None]) -> list[float]:
        """Weigh the vote of each sample."""
        if self.kind == "majority+steps":
            return [float(sample.steps.sound) for sample in group.samples]
        return [0.5 if grade is None else grade for grade in grades]

    def grades(self, groups: list[Group], answers: list[list[str]]) -> list[list[float | None]]:
        """Ask the judge once about each text of a problem; None where nothing is asked or told.

        Where a group has one answer, votes of any weight end alike: nothing is asked."""
        def question(group: Group, sample: Sample, answer: str, split: bool) -> Asked | None:
            due = split or self.kind == "judge" and sample.finished and answer
            return asked(group.example.problem, sample.solution) if due else None

        split = [self.kind == "majority+judge" and len({key(typeset(answer)) for answer in own}) > 1 for own in answers]
        due = [[question(group, *each, apart) for each in zip(group.samples, own, strict=True)]
               for group, own, apart in zip(groups, answers, split, strict=True)]
        questions, started = list(dict.fromkeys(q for of_group in due for q in of_group if q)), time.monotonic()
        told, error = ask(self.judge, questions, put=self.judge.grade) if questions else ([], "")
        grade = {q: None if p is None or not 0 <= p <= 1 else float(p) for q, p in zip(questions, told, strict=True)}
        lost = sum(p is None for p in grade.values())
        self.sums.update(seconds=time.monotonic() - started, no_grades=lost)
        if lost and self.judge.fallback == "stop" and (error or lost == len(questions)):
            raise UserError(f"the judge {self.judge.name} is down: {lost} of {len(questions)} solutions have no grade "
                            f"({error or 'it gave none'}); see to it, or go on with judge_fallback=none")
        if 2 * lost > len(questions):
            then = "nothing is learnt from their groups" if self.kind == "judge" else "each of them votes with 1/2"
            self.judge.say_once("lost grades", f"the judge {self.judge.name} gave no grade on {lost} of "
                                f"{len(questions)} solutions ({error or 'too long, or not a number'}): {then}")
        return [[grade.get(q) for q in of_group] for of_group in due]

    def vote(self, answers: list[str], weights: list[float]) -> tuple[list[int], float]:
        """Find the samples with the winning answer, [] for none; and the share of the largest."""
        def votes(places: list[int]) -> float:  # the same in any order: a tie stays one
            return math.fsum(weights[i] for i in places)

        wordings, late, classes = {}, self.checker.timeouts, []
        for i, answer in enumerate(answers):
            if answer:
                wordings.setdefault(key(typeset(answer)), []).append(i)
        for places in sorted(wordings.values(), key=votes, reverse=True):
            largest = sorted(classes, key=votes, reverse=True)[:MOST_COMPARED]
            same = next((own for own in largest if self.checker.timeouts - late < MOST_LATE
                         and self.checker.equal(answers[places[0]], answers[own[0]])), None)
            if same is None:
                classes.append(places)
            else:
                same += places
        first, second = (sorted(classes, key=votes, reverse=True) + [[], []])[:2]
        share = votes(first) / (math.fsum(weights) or 1.0)
        return first if share >= self.majority_share and votes(first) > votes(second) else [], share

    def count(self, group: Group, answers: list[str]) -> None:
        """Take in a marked group; of a decided one with a gold answer how many labels are right."""
        self.sums.update(groups=1, decided=group.decided)
        if group.decided and (gold := group.example.answer.strip()):
            right = {answer: bool(answer) and self.checker.equal(answer, gold) for answer in dict.fromkeys(answers)}
            self.sums.update(samples=len(answers), agrees=sum(
                sample.correct == right[answer] for sample, answer in zip(group.samples, answers, strict=True)))

    def metrics(self) -> dict:
        """Figures of labels that no answer gave, since the last call, of all processes.

        verifier/decided: share of the groups. share: of the largest answer's votes, mean over groups. agrees: share of
        the samples of decided groups whose label is that of verifier=exact, where the data has answers. no_grades:
        solutions that the judge did not grade. seconds: of grading, all processes together."""
        if self.kind not in LABEL_FREE:
            return {}
        sums, self.sums = Counter(dist.all_reduce_sum(dict(self.sums))), Counter()
        groups = sums["groups"] or 1
        metrics = {"decided": sums["decided"] / groups}
        if self.kind != "judge":
            metrics["share"] = sums["share"] / groups
        if sums["samples"]:
            metrics["agrees"] = sums["agrees"] / sums["samples"]
        if self.kind in BY_JUDGE:
            metrics |= {"no_grades": sums["no_grades"], "seconds": sums["seconds"]}
        return {f"verifier/{name}": value for name, value in metrics.items()}


def answer_of(sample: Sample) -> str:
    """Return the final answer, or "" for none that can be compared."""
    answer = "" if sample.cut_thinking else final_answer(sample.text, sample.finished) or ""
    return answer if len(answer) <= MAX_ANSWER_CHARS and key(typeset(answer)) else ""


def answer_pattern(example: Example) -> str:
    """Return the reference answer as a pattern, or raise UserError."""
    pattern = example.answer.strip()
    try:
        re.compile(pattern, re.IGNORECASE | re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{example.where or example.id or 'example'}: verifier=regex, but the answer {pattern[:200]!r} "
                        f"is no regular expression ({error}); escape special characters, or use verifier=exact"
                        ) from None
    return pattern
