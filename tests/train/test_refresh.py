"""A judge that learns on during a run: resumed anywhere it is the same, and the policy never notices."""
import importlib
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from judging import sample
from safetensors.torch import load_file
from toy import adapter, before_call, load, make_config, metrics, policy_of, same_tensors, wake_adapter, without_times

from minimath.config.schema import JudgeOptions, RLAIFConfig, SFTConfig
from minimath.core.checkpoint import list_checkpoints, save_adapter
from minimath.core.errors import UserError
from minimath.data.examples import Example
from minimath.data.sample import Group
from minimath.judges.card import JUDGE, JudgeCard, read_card, write_card
from minimath.judges.known import problem_hash
from minimath.judges.self_judge import SelfJudge
from minimath.models.forward import active_adapters
from minimath.train import refresh as refresh_file
from minimath.train import rlaif as rlaif_file
from minimath.train.refresh import JudgeRefresh


@pytest.fixture
def judge(ending_dir, tmp_path):
    """judge(form) -> folder of a judge's adapter that changes much."""
    def make(form="single", **card):
        model, _ = load(ending_dir, SFTConfig, train=True, lora_r=3)
        wake_adapter(model, 0.2, seed=5)
        folder = save_adapter(model, tmp_path / f"of-{form}")
        card = {"form": form, "system": "", "prompt_template": "{problem}", "problems": ["aa"]} | card
        rubric = "" if form == "single" else "Which? {nonce} {problem}\n{nonce} A: {first}\n{nonce} B: {second}"
        write_card(folder, JudgeCard(rubric=rubric, **card))
        return str(folder)
    return make


@pytest.fixture
def rl_judged(rl):
    def run(name, folder, **options):
        return rl(name, **{"steps": 5, "judge": "self", "judge_adapter": folder, "judge_refresh": 2,
                           "judge_refresh_steps": 2, "judge_refresh_lr": 1e-2, "judge_canary_every": 3} | options)
    return run


def judge_of(run) -> dict:
    return load_file(run / JUDGE / "adapter_model.safetensors")


def assert_same(one, two):
    assert without_times(metrics(one)) == without_times(metrics(two))
    assert same_tensors(adapter(one), adapter(two)) and same_tensors(judge_of(one), judge_of(two))
    assert (one / JUDGE / "judge.json").read_text() == (two / JUDGE / "judge.json").read_text()
    states = [json.loads((list_checkpoints(run)[0] / "state.json").read_text())["tracked"] for run in (one, two)]
    assert states[0] == states[1]
    assert same_tensors(*(load_file(list_checkpoints(run)[0] / "tracked.safetensors") for run in (one, two)))


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


# ---- resumed

@pytest.mark.parametrize("options", [{}, {"form": "pair", "lora_dropout": 0.1}, {"updates_per_rollout": 2},
                                     {"verifier": "majority", "majority_share": 0.0}],
                         ids=["single", "pair", "two updates", "majority"])
def test_stopped_between_refreshes_and_right_after_one_and_resumed_equals_unbroken(
        rl_judged, judge, monkeypatch, one_thread, options):
    folder = judge((options := dict(options)).pop("form", "single"))
    whole = rl_judged("whole", folder, **options)
    with monkeypatch.context() as patch:        # the signal comes in the rollout of step 3: that is not counted
        before_call(patch, rlaif_file, "collect_groups", 3, ctrl_c)
        broken = rl_judged("broken", folder, **options)
    assert len(metrics(broken)) == 2 and judge_of(broken)  # it learnt at step 2
    with monkeypatch.context() as patch:        # and in the update of step 3: between two refreshes
        before_call(patch, rlaif_file, "update", 1, ctrl_c)
        rl_judged("broken", folder, resume=True, **options)
    assert len(metrics(broken)) == 3
    with monkeypatch.context() as patch:        # and in the refresh of step 4: right after it
        before_call(patch, JudgeRefresh, "learn", 1, ctrl_c)
        rl_judged("broken", folder, resume=True, **options)
    assert len(metrics(broken)) == 4
    rl_judged("broken", folder, resume=True, **options)
    refreshed = ["judge/refresh_loss" in of_step for of_step in metrics(whole)]
    assert refreshed == [False, True, False, True, False] or "verifier" in options and any(refreshed)
    assert_same(whole, broken)


def test_a_crash_in_the_midst_of_a_refresh_and_resumed_equals_unbroken(rl_judged, judge, monkeypatch, one_thread):
    folder = judge()
    whole = rl_judged("whole", folder, save_every=1)
    with monkeypatch.context() as patch:
        before_call(patch, refresh_file, "learn", 4, lambda: 1 / 0)    # the first update of the judge is done
        with pytest.raises(ZeroDivisionError):
            rl_judged("broken", folder, save_every=1)
    rl_judged("broken", folder, save_every=1, resume=True)
    assert_same(whole, whole.parent / "broken")


def test_the_judge_of_a_run_is_one_to_start_from(rl_judged, judge):
    first = rl_judged("first", judge(), steps=2)
    second = rl_judged("second", str(first / JUDGE), steps=2)
    assert not same_tensors(judge_of(first), judge_of(second))
    assert set(read_card(first / JUDGE).problems) <= set(read_card(second / JUDGE).problems)


def test_a_resume_without_refresh_or_with_another_judge_says_so(rl_judged, judge, ending_dir, tmp_path, capsys):
    folder = judge()
    rl_judged("run", folder, steps=2)
    model, _ = load(ending_dir, SFTConfig, train=True, lora_r=5)
    other = save_adapter(model, tmp_path / "other")
    write_card(other, read_card(folder))
    with pytest.raises(UserError, match="judge_adapter is not the one that this run has refreshed so far"):
        rl_judged("run", str(other), steps=3, resume=True)
    capsys.readouterr()
    rl_judged("run", folder, steps=3, judge_refresh=0, resume=True)
    said = capsys.readouterr().out
    assert "the judge is that of judge_adapter again, not what it learnt in 1 refreshes" in said
    assert "judge_refresh_steps and judge_refresh_lr have no effect without judge_refresh=N" in said


# ---- memory

def test_memory_that_runs_out_in_a_refresh_is_tried_again_and_gives_the_same_judge_but_for_rounding(
        rl_judged, judge, monkeypatch, capsys):
    folder = judge()
    whole = rl_judged("whole", folder, steps=2, judge_canary_every=0)
    with monkeypatch.context() as patch:
        def no_memory():
            raise torch.OutOfMemoryError("CUDA out of memory")
        before_call(patch, importlib.import_module("minimath.train.sft"), "hidden_states", 1, no_memory)
        small = rl_judged("small", folder, steps=2, judge_canary_every=0)
    assert "going on with micro_batch_tokens" in capsys.readouterr().out
    assert same_tensors(adapter(whole), adapter(small))
    one, two = judge_of(whole), judge_of(small)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-4, rtol=1e-3)


# ---- what a refresh does and does not

@pytest.fixture
def refreshed(ending_dir, judge, tmp_path):
    """refreshed(**card) -> (JudgeRefresh of a policy that trains, the policy, its judge)."""
    def make(form="single", every=1, verifier="exact", **card):
        policy = policy_of(ending_dir, RLAIFConfig, train=True, lora_r=4)
        wake_adapter(policy.model, 0.1)
        own = SelfJudge(JudgeOptions(adapter=judge(form, **card)), policy)
        cfg = make_config(RLAIFConfig, ending_dir, judge="self", judge_adapter="x", judge_refresh=every,
                          judge_refresh_lr=1e-2, prompts_per_step=2, seed=3, verifier=verifier)
        return JudgeRefresh(cfg, policy, own, SimpleNamespace(say=print, run_dir=tmp_path)), policy, own
    return make


def step(number=1):
    return SimpleNamespace(number=number, due=lambda every: number % every == 0)


def group(problem="p", decided=True):
    samples = [sample("1 + 2 = 3. \\boxed{3}", True, 9), sample("1 + 2 = 4. \\boxed{4}", False, 9),
               sample("1 + 3 = 4. \\boxed{4}", False, 8), sample("\\boxed{3}", True, 4)]
    return Group(Example(problem), [1], samples, decided=decided)


@pytest.mark.parametrize("form", ["single", "pair"])
def test_nothing_of_the_policy_changes(refreshed, form):
    refresh, policy, _ = refreshed(form)
    model = policy.model

    def state():
        return {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    before, active, generator = state(), active_adapters(model), torch.get_rng_state()
    assert {"judge/refresh_loss", "judge/refresh_rows"} == set(refresh.learn(step(), [group()]))
    after = state()
    changed = {name for name in before if not torch.equal(before[name][0], after[name][0])}
    assert changed and all(".judge." in name for name in changed)
    assert all(before[name][1] == after[name][1] for name in before)
    assert not any(flag for name, (_, flag) in after.items() if ".judge." in name)
    assert all(p.grad is None for p in model.parameters())
    assert active_adapters(model) == active and model.training and torch.equal(generator, torch.get_rng_state())


def test_what_trains_is_as_before_when_a_refresh_fails(refreshed, monkeypatch):
    refresh, policy, _ = refreshed()
    before, active = policy.trainable(), active_adapters(policy.model)
    monkeypatch.setattr(refresh_file, "learn", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        refresh.learn(step(), [group()])
    assert policy.trainable() == before and active_adapters(policy.model) == active


def test_groups_are_kept_until_a_refresh_is_due_and_undecided_ones_teach_nothing(refreshed):
    refresh, _, _ = refreshed(every=2)
    weights = [p.detach().clone() for p in refresh.params]
    assert refresh.learn(step(1), [group("a"), group("b", decided=False)]) == {}
    assert [each["problem"] for each in refresh.newest] == ["a"]
    assert refresh.learn(step(2), [group("c", decided=False)])["judge/refresh_rows"] == 4
    assert refresh.newest == [] and refresh.done == 1
    assert any(not torch.equal(a, b) for a, b in zip(weights, refresh.params))
    weights = [p.detach().clone() for p in refresh.params]
    assert refresh.learn(step(4), [group("d", decided=False)]) == {} and refresh.done == 1
    assert all(torch.equal(a, b) for a, b in zip(weights, refresh.params))


@pytest.mark.parametrize("verifier, taught", [(lambda text, example: True, 3), ("exact", 4), ("majority", 4)])
def test_a_cut_completion_of_which_a_users_function_was_not_asked_teaches_nothing(refreshed, verifier, taught):
    refresh, _, _ = refreshed(every=2, verifier=verifier)
    of_one = group()
    of_one.samples[1].finished = False  # marked as wrong, unread
    refresh.learn(step(1), [of_one])
    assert [len(each["records"]) for each in refresh.newest] == [taught]


def test_a_pair_judge_learns_nothing_of_groups_without_pairs(refreshed):
    refresh, _, _ = refreshed("pair")
    of_one = group()
    of_one.samples = of_one.samples[1:3]                       # all wrong
    assert refresh.learn(step(), [of_one]) == {} and refresh.newest == []


def test_problems_of_the_canary_are_held_out_and_all_others_stand_in_the_card(refreshed, tmp_path):
    refresh, _, own = refreshed(pairs=[["held out?", "right", "wrong"]])
    refresh.learn(step(), [group("held out?"), group("seen?")])
    refresh.learn(step(), [group("another?")])
    with refresh:
        pass
    card = read_card(tmp_path / JUDGE)
    assert set(card.problems) == {"aa", problem_hash("seen?"), problem_hash("another?")}  # it was {"aa"}
    assert card.pairs == own.card.pairs and own.card.problems == ["aa"]


def test_a_judge_that_learnt_nothing_is_not_saved(refreshed, tmp_path):
    refresh, _, _ = refreshed()
    refresh.learn(step(), [group(decided=False)])
    with refresh:
        pass
    assert not (tmp_path / JUDGE).exists()


def test_its_state_comes_back_and_does_not_change_afterwards(refreshed):
    one, _, _ = refreshed(every=2)
    one.learn(step(2), [group("a")])
    one.learn(step(3), [group("b")])
    state = one.state_dict()
    before = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    kept = json.loads(json.dumps({name: value for name, value in state.items() if name != "tensors"}))
    two, _, _ = refreshed(every=2)
    two.load_state_dict(kept | {"tensors": {name: tensor.clone() for name, tensor in before.items()}})
    handed_out = two.state_dict()["tensors"]
    one.learn(step(4), [group("c")])
    two.learn(step(4), [group("c")])
    assert same_tensors(state["tensors"], before) and same_tensors(handed_out, before)  # what a checkpoint holds
    assert same_tensors(one.state_dict()["tensors"], two.state_dict()["tensors"])
    assert not same_tensors(one.state_dict()["tensors"], before)


def test_a_checkpoint_of_before_the_judges_problems_were_kept_goes_on_and_says_what_is_not_known(refreshed):
    one, _, _ = refreshed()
    one.learn(step(), [group("a")])
    state = one.state_dict()
    del state["learnt"]
    two, _, _ = refreshed()
    two.log.say = (said := []).append
    two.load_state_dict(state)
    assert "check that judge on data that this run does not train on" in said[0]
    assert (two.done, two.learnt) == (1, set()) and same_tensors(two.state_dict()["tensors"], state["tensors"])


@pytest.mark.parametrize("options", [{"judge_adapter": ""}, {"judge_weight": 0.0}, {"reward": "paper"},
                                     {"verifier": "judge"}, {"verifier": "majority+judge"}, {"verifier": "none"}])
def test_a_refresh_without_a_judge_to_train_or_marks_to_train_it_on_is_refused(rl_judged, judge, options):
    with pytest.raises(UserError, match="judge_refresh trains a judge_adapter="):
        rl_judged("run", judge(), **options)


# ---- label-free, through the loop

@pytest.mark.parametrize("verifier", ["majority", "majority+steps", "judge", "majority+judge"])
def test_runs_without_answers_log_what_their_labels_are_worth(rl_judged, judge, verifier, tmp_path):
    rows = [{"problem": f"Tom has {k} apples and buys {k + 7} more. How many?"} for k in range(2, 8)]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = rl_judged("run", judge(), verifier=verifier, data=str(tmp_path / "bare.jsonl"), steps=2, judge_refresh=0,
                    **{"majority_share": 0.0} if "majority" in verifier else {})
    for of_step in metrics(run):
        assert 0 <= of_step["verifier/decided"] <= 1 and "verifier/agrees" not in of_step
        assert ("verifier/share" in of_step) == (verifier != "judge")
        assert ("verifier/no_grades" in of_step) == ("judge" in verifier)


def test_an_untrained_judge_can_grade_and_one_that_compares_pairs_cannot_verify(rl, rl_judged, judge):
    run = rl("one", judge="self", judge_form="single", verifier="majority+judge", steps=1)
    assert metrics(run)[0]["verifier/no_grades"] == 0 and "judge/comparisons" in metrics(run)[0]
    with pytest.raises(UserError, match="needs a judge that grades single solutions"):
        rl("two", judge="self", verifier="judge", steps=1)
    with pytest.raises(UserError, match="judge_form=single, but judge_adapter was trained for pair"):
        rl_judged("three", judge("pair"), judge_form="single", steps=1)
