"""Stage 2: the real loop on a tiny random model, with completions called correct by their parity."""
import json
import math
from collections import Counter

import pytest
import torch
from toy import adapter, load, metrics, never, parity, same_tensors, without_times

import minimath.train.rlaif as loop
from minimath.config.schema import RLAIFConfig
from minimath.core.errors import Interrupted, UserError
from minimath.data.batch import stream_indices
from minimath.data.examples import Example
from minimath.data.sample import Group, Sample
from minimath.judges.base import HeuristicJudge
from minimath.judges.pairs import Canary
from minimath.models.policy import Policy
from minimath.rollout.engine import Engine
from minimath.train import rewards
from minimath.train.advantages import set_advantages
from minimath.train.batches import PolicyBatch, in_loss
from minimath.train.optimizer import Optimizer
from minimath.train.rewards import make_reward

JUDGED = {"judge": "self", "group_size": 8, "overlong": "none", "prompts_per_step": 3}
LOSSES = ("dapo", "grpo", "dr_grpo", "cispo", "gspo")


@pytest.fixture
def updates(monkeypatch):
    """The (kept groups, all groups) of every update of the loop."""
    seen, real = [], loop.update

    def record(cfg, policy, optimizer, kept, groups, *more):
        seen.append((kept, groups))
        return real(cfg, policy, optimizer, kept, groups, *more)

    monkeypatch.setattr(loop, "update", record)
    return seen


@pytest.fixture
def generates(monkeypatch):
    """generates(call=None) -> the calls of Engine.generate from now on; the one of that number is interrupted."""
    real = Engine.generate

    def patch(interrupted_at=0):
        calls = []

        def generate(self, *args, **options):
            calls.append(args)
            if len(calls) == interrupted_at:
                raise Interrupted(15)
            return real(self, *args, **options)

        monkeypatch.setattr(Engine, "generate", generate)
        return calls
    return patch


def samples(run_dir):
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def lora_b(run_dir):
    return sum(float(t.abs().sum()) for name, t in adapter(run_dir).items() if "lora_B" in name)


def same_run(one, two):
    assert without_times(metrics(one)) == without_times(metrics(two)) and metrics(one)
    return samples(one) == samples(two) and same_tensors(adapter(one), adapter(two))


# ---- steps

@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", [{}, {"updates_per_rollout": 2, "kl_coef": 0.05, "entropy_coef": 0.01}])
def test_every_loss_changes_the_adapter(rl, loss, options):
    run_dir = rl(loss=loss, **options)
    assert lora_b(run_dir) > 0
    for record in metrics(run_dir):
        assert record["rollout/groups"] > 0 and record["optim/stepped"] == 1 and record["optim/grad_norm"] > 0
        names = ("loss", "policy/entropy", "reward/mean", "rollout/surprisal")
        assert all(math.isfinite(record[name]) for name in names)
        if not options:  # the policy that sampled is the one that trains
            assert record["policy/clipped"] == 0 and record["policy/off_policy"] == 0


def test_the_gradient_is_the_policy_gradient_of_the_sampled_groups(rl, updates, ending_dir):
    """Against a few lines of torch on full logits: sum of A logp / trained tokens, at temperature 0.8."""
    record = metrics(rl(steps=1, temperature=0.8, max_grad_norm=0.0))[0]
    [(groups, _)] = updates
    model, _ = load(ending_dir, RLAIFConfig, train=True, lora_r=4)
    total, tokens = 0.0, 0
    for group in groups:
        for sample in group.samples:
            if not sample.finished:
                continue
            n = sample.tokens
            logits = model(input_ids=torch.tensor([group.prompt + sample.ids])).logits[0, -n - 1:-1]
            logp = torch.log_softmax(logits / 0.8, -1).gather(1, torch.tensor(sample.ids)[:, None])
            total, tokens = total - sample.advantage * logp.sum(), tokens + n
    (total / tokens).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.requires_grad])
    assert record["optim/grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert record["data/trained_tokens"] == tokens


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_leave_the_update_unchanged(rl, loss):
    options = {"loss": loss, "updates_per_rollout": 2, "kl_coef": 0.1, "steps": 1, "prompts_per_step": 3}
    whole, cut = (metrics(rl(f"{micro}", micro_batch_tokens=micro, **options))[0] for micro in (4096, 70))
    for name in ("loss", "optim/grad_norm", "policy/entropy", "policy/kl", "policy/clipped"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


def test_updates_per_rollout_are_that_many_optimiser_steps(rl, monkeypatch):
    count, real = [], Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda *args: count.append(1) or real(*args))
    rl(steps=1, updates_per_rollout=3)
    assert len(count) == 3


def test_the_reference_is_the_base_model(rl):
    """At the first step the fresh adapter is the base: no KL. At the next it has moved away."""
    first, second = metrics(rl(kl_coef=0.1, lr=3e-2), "policy/kl")
    assert first["policy/kl"] == pytest.approx(0, abs=1e-6) and second["policy/kl"] > 1e-5


@pytest.mark.parametrize("options", [
    JUDGED, {**JUDGED, "judge_pairs": 2}, {"reward": "paper"},
    {"verifier": "none", "overlong": "none"}, {"scale_advantage": "rloo", "brevity_weight": 0.25},
    {"overlong": "penalty"},
    {"top_p": 0.9, "min_p": 0.02, "temperature": 1.2}, {"max_num_seqs": 3}, {"gradient_checkpointing": True},
    {"rollout": "transformers"}, {"curriculum": "learnable"}])
def test_other_options_train(rl, options):
    run_dir = rl(**options)
    assert lora_b(run_dir) > 0
    if options.get("judge") == "self":
        assert sum(r["judge/comparisons"] for r in metrics(run_dir)) > 0
        assert not any(r["judge/error"] for r in metrics(run_dir))


# ---- groups without a signal

def test_groups_without_a_signal_are_dropped_refilled_and_counted(rl, updates):
    records = metrics(rl(verifier=parity, steps=4, max_refill=2))
    assert sum(r["rollout/dropped_groups"] for r in records) > 0
    for record in records:
        groups, dropped = record["rollout/groups"], record["rollout/dropped_groups"]
        assert record["rollout/samples"] == 4 * (groups + dropped)
        assert groups <= 2 and (groups == 2 or dropped >= 3)  # gave up only after max_refill rounds
    # a refill that worked
    assert any(record["rollout/dropped_groups"] and record["rollout/groups"] == 2 for record in records)
    assert all(group.has_signal() for groups, _ in updates for group in groups)


def test_a_run_without_any_signal_changes_nothing_and_ends(rl):
    run_dir = rl(verifier=never, max_refill=1)
    names = ("rollout/groups", "rollout/dropped_groups", "rollout/correct", "optim/stepped", "loss")
    assert [tuple(r[name] for name in names) for r in metrics(run_dir, *names)] == [(0, 4, 0.0, None, None)] * 2
    assert lora_b(run_dir) == 0


def test_samples_from_nan_logits_are_counted_as_steps_that_are_not_finite():
    cfg, optimizer = RLAIFConfig(), Counter()
    optimizer.skip_step = lambda finite: {"finite": finite}
    for logp, finite in ((-1.0, True), (math.nan, False)):
        group = Group(Example("?", answer="1"), [1], [Sample([2], [logp], True)])
        assert loop.update(cfg, None, optimizer, [], [group]) == {"finite": finite}


# ---- reruns

def test_the_same_seed_gives_the_same_run(rl):
    one, two, other = rl("one"), rl("two"), rl("other", seed=1)
    assert same_run(one, two) and without_times(metrics(one)) != without_times(metrics(other))


@pytest.mark.parametrize("options", [
    {"lora_dropout": 0.1, "updates_per_rollout": 2}, {**JUDGED, "curriculum": "learnable"}])
def test_resume_after_an_interrupted_rollout_equals_an_unbroken_run(rl, generates, monkeypatch, options):
    """Interrupted in any rollout, refills too: its problems are drawn again, and everything after is the same, what is
    measured and warned of too."""
    monkeypatch.setattr("minimath.train.monitor.WINDOW", 1)
    monkeypatch.setattr("minimath.train.monitor.CUT_SHARE", -1.0)  # something is warned of
    options |= {"verifier": parity, "steps": 3}
    calls = generates()
    unbroken, state = rl("unbroken", **options), saved_state(rl("unbroken", resume=True, **options))
    assert len(calls) > 4
    for interrupted_at in (2, 3, 4, 5)[:len(calls) - 1]:
        calls = generates(interrupted_at)
        name = f"broken{interrupted_at}"
        rl(name, **options)
        assert len(calls) == interrupted_at
        generates()
        broken = rl(name, resume=True, **options)
        assert same_run(broken, unbroken)
        assert saved_state(broken) == state and state["sampler"]["counts"] and state["monitor"]["said"]


def saved_state(run_dir):
    """What the tracked objects left in the checkpoint of step 3."""
    return json.loads((run_dir / "checkpoints" / "step-000003" / "state.json").read_text())["tracked"]


def test_a_curriculum_that_is_off_draws_the_problems_in_the_order_of_the_data(rl, monkeypatch):
    drawn, real = [], loop.sample_groups

    def sample_groups(engine, verifier, problems, size):
        drawn.extend(problem.example.id for problem in problems)
        return real(engine, verifier, problems, size)

    monkeypatch.setattr(loop, "sample_groups", sample_groups)
    rl(steps=3, verifier=parity)
    assert drawn == [f"p{i}" for i in stream_indices(0, len(drawn), 12, 0)]


# ---- judges

def test_an_unreachable_judge_stops_the_run_before_any_work(rl, monkeypatch, tmp_path):
    monkeypatch.setattr(Engine, "generate", lambda *a, **k: pytest.fail("sampled without a judge"))
    with pytest.raises(UserError, match="127.0.0.1:9"):
        rl(judge="openai", judge_url="http://127.0.0.1:9/v1", judge_model="m", judge_timeout_s=2.0)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


class FailingJudge(HeuristicJudge):
    """Fails in every call."""
    error = RuntimeError("the judge's card is gone")

    def compare(self, pairs):
        raise self.error


def test_a_judge_that_fails_is_said_once_and_the_run_goes_on_without_its_votes(rl, monkeypatch, capsys):
    monkeypatch.setattr(rewards, "make_judge", lambda options, policy, *, micro_batch_tokens, say: FailingJudge(
        options, say=say))
    run_dir = rl(**JUDGED | {"judge": "heuristic"})
    said = capsys.readouterr().out
    assert said.count("the judge's card is gone") >= 1
    assert sum("failed (RuntimeError: the judge's card is gone)" in line for line in said.splitlines()) == 1
    records = metrics(run_dir)
    assert any(r["judge/comparisons"] for r in records) and lora_b(run_dir) > 0
    for record in records:
        assert record["judge/no_votes"] == record["judge/comparisons"]
        assert record["judge/comparisons"] == 0 or "card is gone" in record["judge/error"]


def test_a_judge_that_fails_stops_the_run_where_that_was_asked_for(rl, monkeypatch):
    monkeypatch.setattr(rewards, "make_judge", lambda options, policy, *, micro_batch_tokens, say: FailingJudge(
        options, say=say))
    with pytest.raises(UserError, match="is down.*judge_fallback"):
        rl(judge_fallback="stop", **JUDGED | {"judge": "heuristic"})


def test_a_self_judge_out_of_memory_asks_in_smaller_passes_and_the_run_is_the_same(rl, monkeypatch, capsys):
    from minimath.judges import self_judge
    whole = rl("whole", **JUDGED)
    real, calls = self_judge.verdict_logps, []

    def verdict_logps(*args):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(self_judge, "verdict_logps", verdict_logps)
    capsys.readouterr()
    small = rl("small", **JUDGED)
    assert capsys.readouterr().out.count("out of memory") == 1
    for one, two in zip(metrics(whole), metrics(small), strict=True):
        assert two["judge/no_votes"] == 0 and two["reward/mean"] == pytest.approx(one["reward/mean"], rel=1e-4)


def test_canary_pairs_are_judged_every_so_often_and_change_nothing(rl):
    watched, plain = rl("watched", steps=3, judge_canary_every=2), rl("plain", steps=3)
    assert ["canary/worse_wins" in record for record in metrics(watched)] == [False, True, False]
    record = metrics(watched)[1]
    assert record["canary/pairs"] == 24 and record["canary/worse_wins"] == 0  # the heuristic judge is not fooled
    assert record["canary/agreement"] == 1
    assert not any("canary/pairs" in record for record in metrics(plain))
    assert same_tensors(adapter(watched), adapter(plain))


def test_the_canary_gap_is_warned_of_in_the_loop(rl, monkeypatch, capsys):
    monkeypatch.setattr(Canary, "metrics", lambda self, groups: {
        "canary/worse_wins": 0.1, "canary/rollout_worse_wins": 1.0, "canary/rollout_pairs": 30})
    rl(steps=3, judge_canary_every=2)
    said = capsys.readouterr().out
    assert "step 2: the canary gap opens" in said and said.count("canary gap") == 1


def test_an_interrupt_while_the_canary_is_judged_costs_its_step_alone(rl, monkeypatch):
    """The canary comes before the update, so that the weights are still those of the last commit."""
    options = {"steps": 4, "judge_canary_every": 3}
    unbroken = rl("unbroken", **options)
    with monkeypatch.context() as patch:
        patch.setattr(Canary, "metrics", lambda self, groups: (_ for _ in ()).throw(Interrupted(2)))
        broken = rl("broken", **options)
    assert len(metrics(broken)) == 2
    assert same_run(rl("broken", resume=True, **options), unbroken)


# ---- rewards as the loop assigns them

def test_too_few_problems_for_a_step_are_refused(rl):
    with pytest.raises(UserError, match="max_prompt_len"):
        rl(max_prompt_len=3)


def test_wrong_never_outranks_correct_in_the_logged_samples(rl):
    mixed = 0
    for record in samples(rl(steps=4, format_weight=0.2, prompts_per_step=3)):
        correct = [r for r, ok in zip(record["rewards"], record["correct"], strict=True) if ok]
        wrong = [r for r, ok in zip(record["rewards"], record["correct"], strict=True) if not ok]
        mixed += bool(correct and wrong)
        assert not (correct and wrong) or min(correct) > max(wrong)
    assert mixed


def scored(overlong, **options):
    """A group of four by hand, of which the last was cut at 16 tokens, with its rewards and advantages."""
    cfg = RLAIFConfig(group_size=4, max_new_tokens=16, judge="heuristic", overlong=overlong, **options)
    rows = zip((4, 8, 6, 16), (True, True, False, False), ("2", "two", "3", "3 and"), strict=True)
    group = Group(Example("1 + 1?", answer="2"), [5, 6],
                  [Sample([9] * n, [-1.0] * n, n < 16, text, correct=ok) for n, ok, text in rows])
    make_reward(cfg, HeuristicJudge(cfg.judge)).score([group])
    set_advantages([group], cfg.loss.scale_advantage, lambda sample: in_loss(sample, cfg))
    return group, cfg


def test_overlong_mask_leaves_the_cut_completion_out(ending_dir):
    group, cfg = scored("mask")
    assert group.samples[3].advantage == 0
    assert sum(s.advantage for s in group.samples[:3]) == pytest.approx(0, abs=1e-5)  # the mean is over the others
    batch = PolicyBatch(Policy(None, None, cfg.model, cfg.prompt), cfg, [group])
    assert sorted(sum(row.loss_mask) for row in batch.rows) == [4, 6, 8] and batch.trained_tokens == 18


def test_overlong_penalty_and_none_train_on_the_cut_completion():
    masked, penalised, plain = (scored(how)[0].samples for how in ("mask", "penalty", "none"))
    assert penalised[3].reward == pytest.approx(plain[3].reward - 1)
    assert [[s.reward for s in each[:3]] for each in (penalised, masked)] == [[s.reward for s in plain[:3]]] * 2
    assert penalised[3].advantage < plain[3].advantage < 0


def test_brevity_is_rewarded_among_the_correct():
    rewards = [s.reward for s in scored("mask", judge_weight=0.0, brevity_weight=0.5, brevity_scale="together",
                                         brevity_control="none")[0].samples]
    assert rewards[0] > rewards[1] > rewards[2]


def test_a_cut_completion_without_a_box_is_never_correct(rl, updates):
    rl(max_new_tokens=3, overlong="none", max_refill=0)
    groups = [g for _, seen in updates for g in seen]
    assert any(not s.finished for g in groups for s in g.samples)
    assert not any(s.correct and not s.finished for g in groups for s in g.samples)


def test_without_a_verifier_every_completion_that_finished_is_correct(rl, updates):
    rl(verifier="none", overlong="none")
    groups = [g for kept, _ in updates for g in kept]
    assert groups and all(s.correct == s.finished for g in groups for s in g.samples)


@pytest.mark.parametrize("how", ["python:", "callable"])
def test_a_reward_of_the_users_own_trains_as_it_says_and_no_judge_is_asked(rl, updates, tmp_path, monkeypatch, how,
                                                                           capsys):
    (tmp_path / "loop_rewards_for_test.py").write_text("def fn(samples, example): return [s.tokens for s in samples]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rewards, "make_judge", lambda *a, **k: pytest.fail("a judge was made"))
    reward = "python:loop_rewards_for_test.fn" if how == "python:" else lambda samples, example: [
        s.tokens for s in samples]
    rl(reward=reward, judge="openai", judge_url="http://127.0.0.1:9/v1", judge_model="m", step_weight=0.5)
    said = capsys.readouterr().out
    assert "judge_url and judge_model have no effect where neither reward nor verifier asks a judge" in said
    assert said.count("step_weight has no effect without") == 1
    groups = [g for kept, _ in updates for g in kept]
    assert groups and all(s.reward == s.tokens for g in groups for s in g.samples)


@pytest.mark.parametrize("options, word", [
    ({"verifier": "python:no_such_module.fn"}, "no_such_module"),
    ({"verifier": "regex", "prompts_per_step": 1}, "regular expression")])
def test_what_the_verifier_cannot_use_stops_the_run_before_any_work(rl, monkeypatch, tmp_path, options, word):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"problem": "1 + 1?", "answer": "(2"}))
    monkeypatch.setattr("minimath.train.trainer.load_policy", lambda *a, **k: pytest.fail("loaded a model"))
    with pytest.raises(UserError, match=word):
        rl(data=str(tmp_path / "bad.jsonl"), **options)


def test_a_reward_that_is_not_there_stops_the_run_before_any_rollout(rl, monkeypatch):
    monkeypatch.setattr(Engine, "generate", lambda *a, **k: pytest.fail("sampled"))
    with pytest.raises(UserError, match="no_such_module"):
        rl(reward="python:no_such_module.fn")
