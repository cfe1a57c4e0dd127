"""A teacher: its log-probs and its KL against full logits, whoever it is; learning from it; resumed as unbroken."""
import json
import os
import shutil
import signal

import pytest
import torch
from toy import adapter, before_call, load, make_config, metrics, policy_of, same_tensors, wake_adapter, without_times

from minimath.config.load import load_config
from minimath.config.schema import RLAIFConfig, SFTConfig
from minimath.core.checkpoint import save_adapter
from minimath.core.errors import UserError
from minimath.data.examples import Example
from minimath.data.sample import Group, Sample
from minimath.models.forward import head
from minimath.models.prefix import trained_states
from minimath.train import rlaif as rlaif_file
from minimath.train.batches import PolicyBatch
from minimath.train.optimizer import Optimizer
from minimath.train.rlaif import policy_loss_of_micro_batch, update
from minimath.train.teacher import TEACHER, open_teacher

SYSTEM = "Be concise."


@pytest.fixture
def other_adapter(ending_dir, tmp_path) -> str:
    """An adapter that changes much."""
    model, _ = load(ending_dir, SFTConfig, train=True, lora_r=3)
    wake_adapter(model, 0.3, seed=5)
    return str(save_adapter(model, tmp_path / "other" / "adapter").parent)


def taught(folder, **options):
    """(cfg, policy, optimizer, batch, groups) of two groups of samples of a policy whose adapter does something."""
    cfg = make_config(RLAIFConfig, str(folder), **{"lora_r": 4, "temperature": 0.8, "judge_weight": 0.0,
                                                   "micro_batch_tokens": 64} | options)
    policy = policy_of(folder, RLAIFConfig, train=True, lora_r=4)
    wake_adapter(policy.model, 0.1, seed=2)
    rng = torch.Generator().manual_seed(0)
    groups = []
    for problem in ("1 + 2?", "3 * 4?"):
        samples = [Sample(torch.randint(5, 60, (n,), generator=rng).tolist(), [-1.5] * n, True, advantage=0.3 * i)
                   for i, n in enumerate((5, 2, 7))]
        groups.append(Group(Example(problem), policy.prompt_ids(problem), samples))
    return cfg, policy, Optimizer(policy, cfg, print), PolicyBatch(policy, cfg, groups), groups


def log_softmax(model, prompt, sample):
    """(n, V) log-probs at temperature 0.8, where each token of a sample is predicted."""
    n = sample.tokens
    logits = model(input_ids=torch.tensor([prompt + sample.ids])).logits[0, -n - 1:-1]
    return torch.log_softmax(logits / 0.8, -1)


def teachers(policy, folder, who, other):
    """(teacher= of the options, the model that it is, its prompt of a problem)."""
    system = SYSTEM if who == "policy" else ""
    prompt = policy_of(folder, RLAIFConfig, train=True, lora_r=4, system=system).prompt_ids
    if who == "policy":
        return {"teacher": "policy", "teacher_system": SYSTEM}, policy.model, prompt
    if who == "adapter":
        return {"teacher": other}, load(folder, adapter=other)[0], prompt
    if who == "base":
        return {"teacher": "base"}, load(folder)[0], prompt
    return {"teacher": str(folder)}, load(folder)[0], prompt  # a second model


@pytest.mark.parametrize("who", ["base", "adapter", "policy", "model"])
def test_what_a_token_gains_is_the_difference_of_log_probs_cut_to_the_cap(ending_dir, other_adapter, who,
                                                                          monkeypatch):
    monkeypatch.setattr("minimath.train.teacher.CAP", 1.2)
    _, policy, optimizer, batch, groups = taught(ending_dir)
    options, model, prompt = teachers(policy, ending_dir, who, other_adapter)
    cfg, *_ = taught(ending_dir, teacher_weight=0.5, **options)
    teacher = open_teacher(cfg, policy, print)
    told = teacher.teach(batch, groups, optimizer)
    gaps = [log_softmax(model, prompt(g.example), s).gather(1, torch.tensor(s.ids)[:, None])[:, 0] + 1.5
            for g in groups for s in g.samples]
    for row, sample, gap in zip(batch.advantage, [s for g in groups for s in g.samples], gaps, strict=True):
        torch.testing.assert_close(row, sample.advantage + 0.5 * gap.clamp(-1.2, 1.2), rtol=1e-4, atol=1e-4)
    gaps = torch.cat(gaps)
    assert told["teacher/kl"] == pytest.approx(-gaps.clamp(-1.2, 1.2).mean().item(), abs=1e-4)
    assert 0 < told["teacher/cut"] == pytest.approx((gaps.abs() > 1.2).float().mean().item())


@pytest.mark.parametrize("who", ["base", "adapter", "policy"])
def test_the_full_kl_and_its_gradient_are_those_of_full_logits(ending_dir, other_adapter, who):
    cfg, policy, optimizer, batch, groups = taught(ending_dir)
    for sample in (s for g in groups for s in g.samples):
        sample.advantage = 0.0
    options, model, prompt = teachers(policy, ending_dir, who, other_adapter)
    cfg, *_ = taught(ending_dir, reward="none", teacher_kl="full", teacher_weight=0.7, **options)
    told = update(cfg, policy, Recorder(policy, cfg, print), groups, groups, open_teacher(cfg, policy, print))
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    total, tokens = 0.0, 0
    for group in groups:
        for sample in group.samples:
            with torch.no_grad():
                wanted = log_softmax(model, prompt(group.example), sample)
            mine = log_softmax(policy.model, group.prompt, sample)
            total, tokens = total + (mine.exp() * (mine - wanted)).sum(), tokens + sample.tokens
    (0.7 * total / tokens).backward()
    assert told["teacher/kl"] == pytest.approx(total.item() / tokens, rel=1e-4) and told["teacher/kl"] > 1e-4
    assert told["loss"] == pytest.approx(0.7 * total.item() / tokens, rel=1e-4)
    expected = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and max(g.abs().max() for g in expected.values()) > 1e-4
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6)


class Recorder(Optimizer):
    """Leaves the gradient where it is."""
    def step(self, batch, closure):
        sums, loss = {}, 0.0
        for indices, micro in batch.micro_batches(64):
            part, told = closure(indices, micro)
            part.backward()
            loss += part.item()
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in told.items()}
        return {name: value / batch.trained_tokens for name, value in sums.items()} | {"loss": loss}


def test_a_teacher_changes_neither_the_policy_nor_what_trains(ending_dir, other_adapter):
    cfg, policy, optimizer, batch, groups = taught(ending_dir, teacher=other_adapter)
    before, trains = {n: p.clone() for n, p in policy.model.named_parameters()}, policy.trainable()
    teacher = open_teacher(cfg, policy, print)
    teacher.teach(batch, groups, optimizer)
    assert policy.trainable() == trains and not any(f".{TEACHER}." in name for name in trains)
    after = dict(policy.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    indices, micro = next(batch.micro_batches(10_000))
    loss, _ = policy_loss_of_micro_batch(cfg, policy, batch, teacher)(indices, micro)
    loss.backward()
    assert all(p.grad is None for name, p in policy.model.named_parameters() if f".{TEACHER}." in name)
    assert trained_states and head(policy.model).weight.grad is None


# ---- whole runs

def test_a_policy_alone_with_a_teacher_comes_nearer_without_answers_or_reward(rl, other_adapter):
    for kl in ("sampled", "full"):
        told = [record["teacher/kl"] for record in metrics(rl(
            kl, steps=5, teacher=other_adapter, teacher_kl=kl, reward="none", verifier="none", prompts_per_step=4,
            group_size=16, overlong="none", lr=3e-2, sample_every=0))]
        assert sum(told[-2:]) < 0.85 * sum(told[:2]), (kl, told)


def test_beside_a_teacher_every_group_teaches_and_none_is_refilled(rl):
    records = metrics(rl(teacher="base", verifier=lambda text, example: True, brevity_weight=0.0))
    assert all(r["rollout/groups"] == 2 and r["rollout/dropped_groups"] == 0 for r in records)
    assert all(r["optim/stepped"] == 1 for r in records)


@pytest.mark.parametrize("options", [{"teacher_kl": "full"}, {"teacher_system": SYSTEM, "updates_per_rollout": 2}],
                         ids=["full", "system prompt"])
def test_stopped_with_a_teacher_and_a_controller_and_resumed_equals_unbroken(rl, other_adapter, monkeypatch,
                                                                             one_thread, few, options):
    options = {"teacher": other_adapter, "steps": 5, "brevity": "ratio", "brevity_control": "accuracy",
               "brevity_scale": "apart", "eval_data": few, "eval_every": 2, "eval_max_new_tokens": 8, **options}
    whole = rl("whole", **options)
    for number in (2, 1):
        with monkeypatch.context() as patch:
            before_call(patch, rlaif_file, "update", number, lambda: os.kill(os.getpid(), signal.SIGINT))
            broken = rl("broken", resume=number == 1, **options)
    broken = rl("broken", resume=True, **options)
    assert without_times(metrics(whole)) == without_times(metrics(broken)) and len(metrics(whole)) >= 5
    assert same_tensors(adapter(whole), adapter(broken))
    states = [json.loads((run / "checkpoints" / "step-000005" / "state.json").read_text()) for run in (whole, broken)]
    assert states[0]["tracked"] == states[1]["tracked"] and states[0]["best"] == states[1]["best"]


@pytest.mark.parametrize("options", [{}, {"teacher_kl": "full"}, {"loss": "gspo", "updates_per_rollout": 2}])
def test_a_step_without_a_sample_that_counts_changes_nothing_beside_a_teacher_either(rl, options):
    for record in metrics(rl(teacher="base", max_new_tokens=1, group_size=2, max_refill=0, **options)):
        assert record["optim/skipped"] == 0 and (record["rollout/finished"] or record["rollout/groups"] == 0)
    assert any(record["rollout/groups"] == 0 for record in metrics(rl("none", teacher="base", max_new_tokens=1,
                                                                      group_size=2, max_refill=0, steps=4, **options)))


# ---- what can't be asked

def test_a_teacher_s_system_message_is_refused_where_rows_have_their_own(rl, tmp_path):
    talk = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 2?"}]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": [*talk[i % 2:], {"role": "assistant", "content": "3"}],
                                        "answer": "3"}) + "\n" for i in range(4)))
    with pytest.raises(UserError, match="no place in 2 chat rows that begin with a system message"):
        rl(data=str(path), teacher="policy", teacher_system=SYSTEM)


def test_a_teacher_that_is_not_there_is_told_from_the_policy(ending_dir):
    cfg, policy, *_ = taught(ending_dir, teacher="./runs/nope")
    with pytest.raises(UserError, match="^teacher=./runs/nope is no folder of an adapter, and as a model: model="):
        open_teacher(cfg, policy, print)


def test_a_teacher_with_other_tokens_is_one_line(ending_dir, tmp_path):
    other = tmp_path / "other-tokens"
    shutil.copytree(ending_dir, other)
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = list(vocab)[30:32]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(tokenizer))
    cfg, policy, *_ = taught(ending_dir, teacher=str(other))
    with pytest.raises(UserError, match="another tokenizer .* take a teacher of the same family"):
        open_teacher(cfg, policy, print)


def test_another_model_has_no_full_kl(ending_dir):
    cfg, policy, *_ = taught(ending_dir, teacher=str(ending_dir), teacher_kl="full")
    with pytest.raises(UserError, match="is another model: use teacher_kl=sampled"):
        open_teacher(cfg, policy, print)


@pytest.mark.parametrize("words, said", [
    (["reward=none"], "reward=none needs a teacher="),
    (["teacher=policy"], "give it another prompt by teacher_system="),
    (["teacher=http://x/v1", "temperature=0.8"], "use temperature=1 and teacher_kl=sampled"),
    (["teacher=http://x/v1", "teacher_kl=full"], "use temperature=1 and teacher_kl=sampled"),
    (["teacher=base", "shard=true"], "shard=true"),
    (["teacher_system=Be concise."], "there is none"),
])
def test_options_that_do_not_go_together_are_refused_with_what_to_do(words, said):
    with pytest.raises(UserError, match=said):
        load_config(RLAIFConfig, None, words)


def test_no_teacher_is_none(ending_dir):
    cfg, policy, *_ = taught(ending_dir)
    with open_teacher(cfg, policy, print) as teacher:
        assert teacher is None


def test_a_server_is_left_when_the_run_ends_and_when_it_fails(rl, monkeypatch):
    left = []

    class Server:
        def __init__(self, *options):
            left.append(False)

        def logps(self, rows):
            return [[-1.0] * len(completion) for _, completion in rows]

        def close(self):
            left[-1] = True

    monkeypatch.setattr("minimath.train.teacher.TeacherServer", Server)
    rl("ends", teacher="http://127.0.0.1:9/v1", steps=1)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        rl("fails", teacher="http://127.0.0.1:9/v1", steps=1, verifier=lambda text, example: 1 / 0)
    assert left == [True, True]
