"""Stage 2: the real loop on a tiny random model, with answers called right by their parity."""

import json
import math

import pytest
import torch
from toy import adapter, load, make_config, metrics, same_tensors, without_times, write_problems

import minimath.train.rlaif as loop
from minimath.rollout import open as engines
from minimath.config.schema import RLAIFConfig
from minimath.core.errors import Interrupted, UserError
from minimath.data.examples import Example
from minimath.rollout.engine import Completion

LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "cispo", "gspo")


class ParityChecker:
    """Stands in for AnswerChecker. Problems with an odd answer are never solved: no signal there."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def check_many(self, rows):
        return [self.hopeful(gold) and sum(text.encode()) % 2 == 0 for text, gold in rows]

    def hopeful(self, gold):
        return int(gold) % 2 == 0


class EvenChecker(ParityChecker):
    def hopeful(self, gold):
        return True


class NeverChecker(ParityChecker):
    def hopeful(self, gold):
        return False


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_problems(tmp_path_factory.mktemp("data") / "problems.jsonl", n=12)


@pytest.fixture
def train(tiny_dir, data, tmp_path, monkeypatch):
    """train(name, checker=..., **options) -> run folder of an RL run of the tiny Llama."""
    # many end tokens: a random model would hardly ever stop by itself
    monkeypatch.setattr(engines, "eos_ids", lambda tokenizer, model=None: list(range(20, 60)))

    def run(name="run", checker=EvenChecker, **options):
        monkeypatch.setattr(loop, "AnswerChecker", checker)
        options = {
            "data": data,
            "steps": 2,
            "prompts_per_step": 2,
            "group_size": 4,
            "max_new_tokens": 16,
            "lora_r": 4,
            "lr": 1e-2,
            "judge": "rules",
            "save_every": 0,
            "sample_every": 1,
            "warmup": 0.0,
            **options,
        }
        loop.rlaif(make_config(RLAIFConfig, tiny_dir, out=str(tmp_path / name), **options))
        return tmp_path / name

    return run


@pytest.fixture
def updates(monkeypatch):
    """The (groups, facts) of every update of the loop."""
    seen, real = [], loop.update

    def record(cfg, model, tokenizer, groups, *rest):
        facts = real(cfg, model, tokenizer, groups, *rest)
        seen.append((groups, facts))
        return facts

    monkeypatch.setattr(loop, "update", record)
    return seen


def samples(run_dir):
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def lora_b(run_dir):
    return sum(float(t.abs().sum()) for name, t in adapter(run_dir).items() if "lora_B" in name)


# ---- steps


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(
    "options", [{}, {"updates_per_rollout": 2, "minibatches": 2, "beta": 0.05, "entropy_coef": 0.01}]
)
def test_every_loss_type_changes_the_adapter(train, loss_type, options):
    run_dir = train(loss_type=loss_type, **options)
    assert lora_b(run_dir) > 0
    for record in metrics(run_dir):
        assert record["groups"] > 0 and record["stepped"] == 1 and record["grad_norm"] > 0
        assert all(math.isfinite(record[name]) for name in ("loss", "entropy", "reward", "surprisal"))
        if not options:  # the policy that sampled is the one that trains
            assert record["clipped"] == 0 and record["off_policy"] == 0


def test_the_gradient_is_the_policy_gradient_of_the_sampled_groups(train, updates, tiny_dir):
    """Against a few lines of torch on full logits: sum of A logp / trained tokens, at temperature 0.8."""
    record = metrics(train(steps=1, temperature=0.8, max_grad_norm=0.0))[0]
    [(groups, _)] = updates
    model, _ = load(tiny_dir, RLAIFConfig, train=True, lora_r=4)
    total, tokens = 0.0, 0
    for group in groups:
        for completion, advantage, valid in zip(group.completions, group.advantage, group.valid, strict=True):
            if not valid:
                continue
            n = len(completion.ids)
            logits = model(input_ids=torch.tensor([group.prompt + completion.ids])).logits[0, -n - 1 : -1]
            logp = torch.log_softmax(logits / 0.8, -1).gather(1, torch.tensor(completion.ids)[:, None])
            total, tokens = total - advantage * logp.sum(), tokens + n
    (total / tokens).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.requires_grad])
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert record["trained_tokens"] == tokens


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_leave_the_update_unchanged(train, loss_type):
    options = {
        "loss_type": loss_type,
        "updates_per_rollout": 2,
        "beta": 0.1,
        "steps": 1,
        "prompts_per_step": 3,
    }
    whole, cut = (metrics(train(f"{micro}", micro_batch_tokens=micro, **options))[0] for micro in (4096, 70))
    for name in ("loss", "grad_norm", "entropy", "kl_ref", "clipped"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name


def test_updates_and_minibatches_give_that_many_optimiser_steps(train, monkeypatch):
    count, real = [], loop.clip_and_step
    monkeypatch.setattr(loop, "clip_and_step", lambda *a, **k: count.append(1) or real(*a, **k))
    train(steps=1, updates_per_rollout=2, minibatches=3)
    assert len(count) == 6


def test_the_reference_is_the_base_model(train):
    """At the first step the fresh adapter is the base: no KL. At the next it has moved away."""
    first, second = metrics(train(beta=0.1, lr=3e-2), "kl_ref")
    assert first["kl_ref"] == pytest.approx(0, abs=1e-6) and second["kl_ref"] > 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"judge": "self"},
        {"reward": "rules"},
        {"reward": "rules", "reward_parts": "right=1,judge=0.25,brevity=0.25"},
        {"gate": "none", "overlong": "none"},
        {"scale_advantage": "rloo"},
        {"importance": "mask", "clip_dual": 3.0, "updates_per_rollout": 2, "beta": 0.1, "kl": "k3"},
        {"overlong": "penalty"},
        {"top_p": 0.9, "min_p": 0.02, "temperature": 1.2},
        {"slots": 3},
        {"gradient_checkpointing": True},
    ],
)
def test_other_options_train(train, options):
    run_dir = train(**options)
    assert lora_b(run_dir) > 0
    if options.get("judge") == "self":
        assert sum(r["judge_comparisons"] for r in metrics(run_dir)) > 0
        assert not any(r["judge_error"] for r in metrics(run_dir))


def test_evaluation_during_training_keeps_the_best(train, data):
    records = metrics(train(eval_data=data, eval_every=1, eval_limit=3))
    assert [r["step"] for r in records if "eval_accuracy" in r] == [1, 2]


# ---- groups without a signal


def test_groups_without_a_signal_are_dropped_refilled_and_counted(train, updates):
    records = metrics(train(checker=ParityChecker, steps=4, max_refill=2))
    assert sum(r["dropped_groups"] for r in records) > 0
    for record in records:
        rounds_left = record["groups"] < 2  # gave up only after max_refill rounds
        assert record["sampled"] == 4 * (record["groups"] + record["dropped_groups"])
        assert record["groups"] <= 2 and (not rounds_left or record["dropped_groups"] >= 3)
    assert any(
        record["dropped_groups"] and record["groups"] == 2 for record in records
    )  # a refill that worked
    assert all(any(group.advantage) for groups, _ in updates for group in groups)


def test_a_run_without_any_signal_changes_nothing_and_ends(train, updates):
    run_dir = train(checker=NeverChecker, max_refill=1)
    assert [(r["groups"], r["dropped_groups"], r["right"]) for r in metrics(run_dir)] == [(0, 4, 0.0)] * 2
    assert not updates and lora_b(run_dir) == 0


# ---- reruns and interruptions


def test_the_same_seed_gives_the_same_run(train):
    one, two, other = train("one"), train("two"), train("other", seed=1)
    assert without_times(metrics(one)) == without_times(metrics(two)) != without_times(metrics(other))
    assert samples(one) == samples(two) and same_tensors(adapter(one), adapter(two))


@pytest.mark.parametrize("interrupted_at", (2, 3, 4, 5))
def test_resume_after_an_interrupted_rollout_equals_an_unbroken_run(train, monkeypatch, interrupted_at):
    """Interrupted in any rollout, refills too: its problems are drawn again, and everything after is the same."""
    options = {"checker": ParityChecker, "steps": 3, "lora_dropout": 0.1, "updates_per_rollout": 2}
    unbroken, calls, real = train("unbroken", **options), [], engines.generate

    def generate(*args, **kwargs):
        calls.append(1)
        if len(calls) == interrupted_at:
            raise Interrupted(15)
        return real(*args, **kwargs)

    monkeypatch.setattr(engines, "generate", generate)
    train("broken", **options)
    assert len(calls) == interrupted_at
    broken = train("broken", resume=True, **options)
    assert without_times(metrics(broken)) == without_times(metrics(unbroken))
    assert samples(broken) == samples(unbroken) and same_tensors(adapter(broken), adapter(unbroken))


def saved_state(run_dir):
    [folder] = (run_dir / "checkpoints").glob("*3")
    return json.loads((folder / "state.json").read_text())


@pytest.mark.parametrize(
    "options",
    [{"curriculum": "learnable"}, {"min_solve_rate": 0.1, "max_solve_rate": 0.9, "updates_per_rollout": 2}],
)
def test_resume_with_a_curriculum_equals_an_unbroken_run(train, monkeypatch, options):
    """Interrupted in the second rollout or a later one, the measured solve rates and the warnings are as they were."""
    monkeypatch.setattr("minimath.train.monitor.WINDOW", 1)
    options |= {"checker": ParityChecker, "steps": 3}
    unbroken, real = train("unbroken", **options), engines.generate
    first_refills = metrics(unbroken)[0]["sampled"] // 4 - 2
    for name, interrupted_at in (("early", 2), ("late", 3 + min(1, first_refills))):
        calls = []

        def generate(*args, calls=calls, last=interrupted_at, **kwargs):
            calls.append(1)
            if len(calls) == last:
                raise Interrupted(15)
            return real(*args, **kwargs)

        monkeypatch.setattr(engines, "generate", generate)
        train(name, **options)
        assert len(calls) == interrupted_at
        broken = train(name, resume=True, **options)
        assert without_times(metrics(broken)) == without_times(metrics(unbroken))
        assert samples(broken) == samples(unbroken) and same_tensors(adapter(broken), adapter(unbroken))
        state = saved_state(broken)
        for key in ("cursor", "curriculum", "monitor"):
            assert state[key] == saved_state(unbroken)[key], key
        assert state["curriculum"]["problems"] and state["monitor"]["said"]
    assert all(record["problems_seen"] >= 2 for record in metrics(unbroken))


def test_a_curriculum_that_is_off_draws_the_problems_in_the_order_of_the_data(train, monkeypatch, data):
    from minimath.data.batch import stream_indices

    drawn, real = [], loop.sample_groups

    def sample_groups(cfg, sample, tokenizer, problems, *rest):
        drawn.extend(example.id for example, _ in problems)
        return real(cfg, sample, tokenizer, problems, *rest)

    monkeypatch.setattr(loop, "sample_groups", sample_groups)
    train(steps=3, checker=ParityChecker)
    assert drawn == [f"p{i}" for i in stream_indices(0, len(drawn), 12, 0)]


def test_an_unreachable_judge_stops_the_run_before_any_work(train, monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "generate", lambda *a, **k: pytest.fail("sampled without a judge"))
    with pytest.raises(UserError, match="127.0.0.1:9"):
        train(
            judge="openai",
            judge_url="http://127.0.0.1:9/v1",
            judge_model="m",
            judge_retries=0,
            judge_timeout_s=2.0,
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_too_few_problems_for_a_step_are_refused(train):
    with pytest.raises(UserError, match="max_prompt_len"):
        train(max_prompt_len=3)


# ---- rewards as the loop assigns them


def test_wrong_never_outranks_right_in_the_logged_samples(train):
    logged = samples(train(steps=4, format_weight=0.2, prompts_per_step=3))
    mixed = 0
    for record in logged:
        right = [r for r, ok in zip(record["rewards"], record["right"], strict=True) if ok]
        wrong = [r for r, ok in zip(record["rewards"], record["right"], strict=True) if not ok]
        mixed += bool(right and wrong)
        assert not (right and wrong) or min(right) > max(wrong)
    assert mixed


def scored(overlong, checker=EvenChecker, **options):
    """A group of four by hand, of which the last was cut at 16 tokens, with its rewards and advantages."""
    cfg = RLAIFConfig(group_size=4, max_new_tokens=16, judge="heuristic", overlong=overlong, **options)
    lengths = [4, 8, 6, 16]
    completions = [Completion([9] * n, [-1.0] * n, n < 16) for n in lengths]
    right = [True, True, False, False]
    valid = [c.ended or overlong != "mask" for c in completions]
    group = loop.Group(
        Example("1 + 1?", answer="2"), [5, 6], completions, ["2", "two", "3", "3 and"], right, valid, [], []
    )
    loop.score_groups(cfg, [group], loop.make_judge(cfg))
    return group


def test_overlong_mask_leaves_the_cut_completion_out():
    group = scored("mask")
    assert group.advantage[3] == 0
    assert sum(group.advantage[:3]) == pytest.approx(0, abs=1e-5)  # the mean is over the others
    rows, _ = loop.training_rows([group])
    assert sorted(sum(row.mask) for row in rows) == [4, 6, 8]


def test_overlong_penalty_and_none_train_on_the_cut_completion():
    masked, penalised, plain = scored("mask"), scored("penalty"), scored("none")
    assert penalised.rewards[3] == pytest.approx(plain.rewards[3] - 1)
    assert penalised.rewards[:3] == plain.rewards[:3] == masked.rewards[:3]
    assert penalised.advantage[3] < plain.advantage[3] < 0


def test_a_cut_completion_is_never_right(train, updates):
    train(max_new_tokens=3, overlong="none")
    completions = [
        (c, ok) for groups, _ in updates for g in groups for c, ok in zip(g.completions, g.right, strict=True)
    ]
    assert any(not c.ended for c, _ in completions)
    assert not any(ok and not c.ended for c, ok in completions)


def test_without_a_gate_every_completion_that_ended_is_right(train, updates):
    train(gate="none", overlong="none", checker=NeverChecker)
    groups = [g for groups, _ in updates for g in groups]
    assert groups and all(g.right == [c.ended for c in g.completions] for g in groups)


def test_a_python_reward_trains_as_it_says(train, updates, tmp_path, monkeypatch):
    (tmp_path / "loop_rewards_for_test.py").write_text("def fn(texts, facts): return facts.tokens")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "judge_groups", lambda *a: pytest.fail("a judge was asked"))
    train(reward="python:loop_rewards_for_test.fn", judge="openai", judge_url="http://127.0.0.1:9/v1", judge_model="m")
    groups = [g for groups, _ in updates for g in groups]
    assert groups and all(g.rewards == [len(c.ids) for c in g.completions] for g in groups)


def test_a_python_gate_that_fails_late_costs_no_step(train, tmp_path, monkeypatch):
    (tmp_path / "loop_gates_for_test.py").write_text(
        "broken = False\n"
        "def fn(text, example):\n"
        "    if broken: raise OSError('no sandbox')\n"
        "    return sum(text.encode()) % 2 == 0\n"
    )
    monkeypatch.chdir(tmp_path)
    options = {"gate": "python:loop_gates_for_test.fn", "steps": 3}
    unbroken, real, calls = train("unbroken", **options), loop.update, []
    import loop_gates_for_test as gates

    def update(*args):
        calls.append(1)
        gates.broken = len(calls) == 2  # from the third rollout on
        return real(*args)

    monkeypatch.setattr(loop, "update", update)
    with pytest.raises(UserError, match="gate=python:loop_gates_for_test.fn raised OSError: no sandbox"):
        train("broken", **options)
    gates.broken = False
    broken = train("broken", resume=True, **options)
    assert len(calls) == 3  # two before, one after
    assert without_times(metrics(broken)) == without_times(metrics(unbroken))
    assert same_tensors(adapter(broken), adapter(unbroken))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"gate": "python:no_such_module.fn"}, "no_such_module"),
        ({"gate": "regex", "prompts_per_step": 1}, "regular expression"),
        ({"reward": "python:no_such_module.fn"}, "no_such_module"),
        ({"reward": "rules", "reward_parts": "cosin=1"}, "cosine"),
    ],
)
def test_what_gate_and_reward_cannot_use_stops_the_run_before_any_work(train, monkeypatch, tmp_path, options, word):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"problem": "1 + 1?", "answer": "(2"}))
    monkeypatch.setattr(loop, "load_model", lambda *a, **k: pytest.fail("loaded a model"))
    with pytest.raises(UserError, match=word):
        train(data=str(tmp_path / "bad.jsonl"), **options)


def test_brevity_is_rewarded_among_the_right():
    group = scored("mask", judge_weight=0.0)
    assert group.rewards[0] > group.rewards[1] > group.rewards[2]
