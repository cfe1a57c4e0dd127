"""A judge with an adapter, of every form: a plain forward pass with that adapter alone says the same."""
import math

import pytest
import torch
from engines import engine_of
from judging import Fixed
from peft import PeftModel
from toy import load, policy_of, wake_adapter
from transformers import AutoModelForCausalLM

from minimath.config.schema import JudgeOptions, SFTConfig
from minimath.core.checkpoint import save_adapter
from minimath.core.errors import UserError
from minimath.judges import self_judge as self_judge_file
from minimath.judges.base import Asked, HeuristicJudge, Pair, asked, better
from minimath.judges.calibrate import Calibration
from minimath.judges.card import JudgeCard, write_card
from minimath.judges.compare import ask
from minimath.judges.self_judge import SelfJudge
from minimath.models.forward import active_adapters

RUBRIC = "Which is better? {nonce} {problem}\n{nonce} A: {first}\n{nonce} B: {second}\n{nonce} A, B or TIE?"
CALIBRATION = Calibration(2.0, 0.3, 0.02)
PROBLEM = "Tom has 12 apples and buys 7 more. How many?"
TEXTS = ["12 + 7 = 19.\nSo he has \\boxed{19}.", "12 + 7 = 19.\nThen 19 + 1 = 20. \\boxed{20}",
         "12 + 7 = 18. \\boxed{18}", "", "12 + 7 = 19.", "He has 7.\nNo. \\boxed{19} apples.\nYes."]
QUESTIONS = [asked(PROBLEM, text) for text in TEXTS] + [asked("Another? " * 9, TEXTS[0])]


@pytest.fixture(scope="module")
def folders(tiny_dir, tmp_path_factory):
    """Folders of a judge's adapter by trained form."""
    model, _ = load(tiny_dir, SFTConfig, train=True, lora_r=3)
    wake_adapter(model, 0.3, seed=5)
    found = {}
    for form in ("single", "pair"):
        found[form] = save_adapter(model, tmp_path_factory.mktemp("judges") / form)
        write_card(found[form], JudgeCard(form=form, system="", prompt_template="{problem}", calibration=CALIBRATION,
                                          rubric=RUBRIC if form == "pair" else ""))
    return found


@pytest.fixture(scope="module")
def policy(tiny_dir):
    policy = policy_of(tiny_dir, SFTConfig, train=True, lora_r=4)
    wake_adapter(policy.model)
    return policy


@pytest.fixture
def judge(policy, folders):
    def make(form="single", micro_batch_tokens=4096, say=print):
        trained = "pair" if form == "pair" else "single"
        if "judge" in policy.model.peft_config:
            policy.model.delete_adapter("judge")
        return SelfJudge(JudgeOptions(adapter=str(folders[trained]), form=form), policy, say=say,
                         micro_batch_tokens=micro_batch_tokens)
    return make


@pytest.fixture(scope="module")
def alone(tiny_dir, folders):
    """log-probs of what follows ids by transformers and peft, with the judge's adapter alone: (T, V)."""
    base = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folders["single"])).eval()

    def logps(ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return logps


def expected(judge, alone, question):
    """P(right) at each end by the definition, one forward pass of its own."""
    reading, (yes, no) = judge.reader.read(question), judge.verdicts
    logp, found = alone(reading.ids), []
    for end in reading.ends:
        verdict = torch.stack([logp[end, yes], logp[end, no]]).softmax(0)
        written = sum(float(logp[place - 1, reading.ids[place]]) for place in reading.numbers if place <= end)
        odds = math.log(verdict[0] / verdict[1]) / CALIBRATION.temperature
        found.append(1 / (1 + math.exp(-(odds + CALIBRATION.likelihood * written + CALIBRATION.bias))))
    return found


@pytest.mark.parametrize("tokens", [1, 1 << 20], ids=["apart", "together"])
@pytest.mark.parametrize("form", ["single", "steps"])
def test_grades_are_those_of_a_plain_forward_pass(judge, alone, form, tokens):
    own = judge(form, tokens)
    want = [expected(own, alone, question) for question in QUESTIONS]
    steps, grades = [steps for _, steps in own.grade_all(QUESTIONS)], own.grade(QUESTIONS)
    for question, values, of_steps, grade in zip(QUESTIONS, want, steps, grades, strict=True):
        assert len(of_steps) == len(question.steps)
        assert of_steps == pytest.approx(values[:-1], abs=1e-5)
        assert grade == pytest.approx(min(values) if form == "steps" else values[-1], abs=1e-5)
    assert len({round(grade, 4) for grade in grades}) >= 5           # they differ, or this shows nothing
    fewer = own.counts["computed_tokens"] < own.counts["prompt_tokens"]
    assert fewer == (tokens > 1)


def test_a_pair_is_judged_with_the_judges_adapter(judge, alone):
    own = judge("pair")
    pairs = [Pair(PROBLEM, Fixed(a), Fixed(b)) for a in TEXTS[:3] for b in TEXTS[:3] if a != b]
    for pair, vote in zip(pairs, own.compare(pairs), strict=True):
        a, _, tie = alone(own.reader.pair(pair))[-1][own.verdicts].softmax(0).tolist()
        assert vote == pytest.approx(a + tie / 2, abs=1e-5)


def test_of_two_grades_the_odds_of_being_right_per_token_decide():
    for a in (0.1, 0.5, 0.9):
        for b in (0.2, 0.5, 0.7):
            for ta, tb in ((10, 10), (10, 30), (30, 10)):
                strengths = [p / (1 - p) / tokens for p, tokens in ((a, ta), (b, tb))]
                assert better(a, b, ta, tb) == pytest.approx(strengths[0] / sum(strengths))
                assert better(a, b, ta, tb) + better(b, a, tb, ta) == pytest.approx(1)
    assert better(0.5, 0.5, 1, 90) == pytest.approx(0.8) and better(0.4, 0.8, 1, 90) < 0.5  # at most four times
    assert better(1.0, 0.0, 99, 1) > 0.999 and better(0.5, 0.5, 5, 5) == 0.5
    assert better(1.0, 1.0, 5, 10) == better(0.0, 0.0, 5, 10) == pytest.approx(2 / 3)
    assert better(None, 0.5, 1, 1) is None is better(0.5, None, 1, 1)


@pytest.mark.parametrize("form", ["single", "steps"])
def test_pairs_are_compared_by_grades_and_each_text_is_read_once(judge, form):
    own = judge(form)
    solutions = [Fixed(text, tokens=n) for n, text in enumerate(TEXTS)]
    pairs = [Pair(PROBLEM, a, b) for a in solutions for b in solutions]
    votes = own.compare(pairs)
    assert own.counts["prompts"] == len(TEXTS)
    grade = dict(zip(TEXTS, own.grade(QUESTIONS[:-1])))
    assert votes == pytest.approx([better(grade[a.text], grade[b.text], a.tokens, b.tokens) for _, a, b, *_ in pairs])
    own.compare([Pair(PROBLEM, solutions[0], solutions[1]), Pair("Another? " * 9, solutions[0], solutions[1])])
    assert own.counts["prompts"] == 2 * len(TEXTS) + 4               # of another problem it is another text


@pytest.mark.parametrize("form", ["single", "steps"])
def test_an_untrained_judge_has_all_forms_and_pair_is_its_own(policy, tiny_dir, form):
    plain = policy_of(tiny_dir)
    own = SelfJudge(JudgeOptions(form=form), plain)
    assert own.form == form and all(0 < grade < 1 for grade in own.grade(QUESTIONS))
    assert SelfJudge(JudgeOptions(), plain).form == "pair"
    reading = own.reader.read(QUESTIONS[0])
    with torch.no_grad():
        logits = plain.model(input_ids=torch.tensor([reading.ids])).logits[0, -1].double()
    [grade] = own.grade(QUESTIONS[:1])
    if form == "single":
        assert grade == pytest.approx(float(logits[own.verdicts].softmax(0)[0]), abs=1e-5)


def test_judges_without_grades_say_so():
    for method in (HeuristicJudge().grade, HeuristicJudge().grade_all):
        with pytest.raises(NotImplementedError):
            method(QUESTIONS)


@pytest.mark.parametrize("form", ["single", "steps"])
def test_a_logit_that_is_no_number_costs_the_grade_of_its_solution_alone(judge, monkeypatch, form):
    own = judge(form, 1)
    plain, real = own.grade(QUESTIONS), self_judge_file.verdict_logps

    def one_nan(model, questions, passes, tree):
        found = real(model, questions, passes, tree)
        found[2] = found[2] * math.nan
        return found
    monkeypatch.setattr(self_judge_file, "verdict_logps", one_nan)
    got = own.grade(QUESTIONS)
    assert got[2] is None is own.grade_all(QUESTIONS)[2][1]          # it was 0.0
    assert [*got[:2], *got[3:]] == [*plain[:2], *plain[3:]]
    votes = own.compare([Pair(PROBLEM, *map(Fixed, of)) for of in ((TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[1]))])
    assert votes[0] is not None and votes[1] is None


@pytest.mark.parametrize("form", ["single", "steps"])
def test_memory_that_runs_out_makes_passes_smaller_and_costs_no_grade(judge, monkeypatch, form):
    said = []
    own = judge(form, say=said.append)
    plain, forward = own.grade(QUESTIONS), self_judge_file.hidden_states
    longest = max(len(own.reader.read(question).ids) for question in QUESTIONS)

    def small(model, input_ids, **kwargs):
        if input_ids.numel() > longest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, input_ids, **kwargs)
    monkeypatch.setattr(self_judge_file, "hidden_states", small)
    grades, error = ask(own, QUESTIONS, put=own.grade)
    assert grades == pytest.approx(plain, abs=1e-5) and not error and len(said) == 1
    own.micro_batch_tokens, longest = 4096, longest - 1              # the longest fits in no memory: it alone is lost
    grades, error = ask(own, QUESTIONS, put=own.grade)
    lost = [i for i, grade in enumerate(grades) if grade is None]
    assert lost == [max(range(len(QUESTIONS)), key=lambda i: len(own.reader.read(QUESTIONS[i]).ids))]
    assert "OutOfMemoryError" in error


def test_forms_that_were_not_trained_are_refused(tiny_dir, folders):
    with pytest.raises(UserError, match="judge_form=pair, but judge_adapter was trained for single"):
        SelfJudge(JudgeOptions(adapter=str(folders["single"]), form="pair"), policy_of(tiny_dir))


# ---- the policy never notices

@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rollouts_behind_a_judge_are_those_without_one(tiny_dir, folders, temperature):
    def rollout(engine):
        return [[(sample.ids, sample.logp) for sample in group] for group in engine.generate(prompts, 3, keys=[0, 1])]

    def made():
        policy = policy_of(tiny_dir, SFTConfig, train=True, lora_r=4)
        wake_adapter(policy.model)
        return policy
    one, two = made(), made()
    prompts = [one.prompt_ids(PROBLEM), one.prompt_ids("A box?")]
    how = {"temperature": temperature, "max_new_tokens": 12, "seed": 3}
    with engine_of(one.model, one.tokenizer, **how) as engine:
        want = [rollout(engine), rollout(engine)]
    own = SelfJudge(JudgeOptions(adapter=str(folders["single"])), two)
    state = {name: (p.detach().clone(), p.requires_grad) for name, p in two.model.named_parameters()}
    active, training = active_adapters(two.model), two.model.training
    with engine_of(two.model, two.tokenizer, **how) as engine:
        got = []
        for _ in range(2):
            grades = own.grade(QUESTIONS)
            got.append(rollout(engine))
            assert own.grade(QUESTIONS) == grades
    assert got == want
    assert (active_adapters(two.model), two.model.training) == (active, training)
    for name, p in two.model.named_parameters():
        assert torch.equal(p, state[name][0]) and p.requires_grad == state[name][1], name
    assert not any(p.requires_grad for name, p in two.model.named_parameters() if ".judge." in name)


def test_asked_cuts_without_loss():
    for text in TEXTS:
        assert "".join(asked("p", text).steps) == text
    assert isinstance(asked("p", "x"), Asked)
