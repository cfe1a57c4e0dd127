"""What both stages need around their algorithm: commit and rollback, checkpoints, evaluation, resume, ways to end."""
import hashlib
import json
import os
import random
import signal
import weakref

import pytest
import torch
from safetensors.torch import load_file
from toy import adapter, even, make_config, metrics, same_tensors, without_times

import minimath.train.trainer as module
from minimath.config.schema import RLAIFConfig, SFTConfig
from minimath.core import checkpoint, interrupt
from minimath.core.checkpoint import best_checkpoint, list_checkpoints, verify
from minimath.core.errors import UserError
from minimath.eval import evaluate
from minimath.train.trainer import Trainer


def at(number, what, place="before"):
    """A hook that does something once, in one step."""
    def hook(where, step):
        if (where, step.number) == (place, number):
            what()
    return hook


def fail():
    raise OSError("the drive is gone")


def ctrl_c_outside_of_the_handlers():
    raise KeyboardInterrupt


def names(run_dir):
    return [folder.name for folder in list_checkpoints(run_dir)]


def assert_same(one, two):
    """Two runs left the same."""
    one, two = one.log.run_dir, two.log.run_dir
    assert without_times(metrics(one)) == without_times(metrics(two))
    assert same_tensors(adapter(one), adapter(two))
    left, right = (json.loads((list_checkpoints(d)[0] / "state.json").read_text()) for d in (one, two))
    assert left["tracked"] == right["tracked"] and left["done"] == right["done"]
    for name in ("optimizer.safetensors", "rng.safetensors"):
        assert same_tensors(*(load_file(list_checkpoints(d)[0] / name) for d in (one, two)))


# ---- commit and rollback

def test_asking_for_the_next_step_commits_the_last_one(go, tmp_path):
    lines = []

    def hook(place, step):
        path = tmp_path / "run" / "metrics.jsonl"
        if place == "before":
            lines.append(len(path.read_text().splitlines()) if path.exists() else 0)
    trainer = go(hook=hook, save_every=2)
    assert lines == [0, 1, 2, 3] and len(metrics(tmp_path / "run")) == 4
    assert names(tmp_path / "run") == ["step-000004", "step-000002"]
    assert trainer.summary() == {"steps": 4, "run_dir": str(tmp_path / "run"), "signal": 0,
                                 "adapter": str(tmp_path / "run" / "adapter")}
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["tracked"]["counter"]["seen"] == trainer.counter.seen[:2]


@pytest.mark.parametrize("cls, place, options", [
    (SFTConfig, "before", {}), (RLAIFConfig, "between", {"updates_per_rollout": 2}),
    (RLAIFConfig, "after", {"updates_per_rollout": 2})])
def test_an_exception_gives_up_its_step_alone_and_saves_the_last_commit(go, tmp_path, capsys, cls, place, options):
    """Weights (after the first of two updates too), random numbers and tracked states go back; the run that goes on is
    an unbroken one, bit by bit."""
    unbroken = go("unbroken", cls=cls, **options)
    with pytest.raises(OSError, match="the drive is gone"):
        go("broken", hook=at(3, fail, place), cls=cls, **options)
    assert names(tmp_path / "broken") == ["step-000002"] and verify(list_checkpoints(tmp_path / "broken")[0]) == []
    assert "the 2 steps done are saved; put it right and go on with resume=true" in capsys.readouterr().out
    assert not (tmp_path / "broken" / "adapter").exists()
    assert_same(go("broken", cls=cls, resume=True, **options), unbroken)
    assert "resumed after step 2" in capsys.readouterr().out


def test_memory_that_runs_out_where_no_pass_can_be_smaller_says_what_to_try_and_is_free_when_the_steps_are_saved(
        go, tmp_path, monkeypatch):
    held = []

    def fail_holding_memory():
        activations = torch.ones(3)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    rescue = Trainer._rescue
    monkeypatch.setattr(Trainer, "_rescue", lambda trainer: (held.append(held[0]()), rescue(trainer)))
    with pytest.raises(UserError, match=r"out of memory \(CUDA out.*gradient_checkpointing=true.*resume=true"):
        go(hook=at(3, fail_holding_memory))
    assert held[1:] == [None] and names(tmp_path / "run") == ["step-000002"]


def test_an_exception_behind_the_only_update_of_a_step_leaves_the_checkpoint_before(go, tmp_path):
    """The weights of that step have no name, and those before it are gone."""
    unbroken = go("unbroken", save_every=2)
    with pytest.raises(OSError):
        go("broken", hook=at(4, fail, "after"), save_every=2)
    assert names(tmp_path / "broken") == ["step-000002"]
    assert_same(go("broken", resume=True, save_every=2), unbroken)


def test_an_interrupt_within_a_step_gives_it_up_and_ends_the_run_as_its_own_end_does(go, tmp_path, capsys):
    def interrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        interrupt.check()
    unbroken = go("unbroken")
    trainer = go("broken", hook=at(3, interrupted))
    said = capsys.readouterr().out
    assert trainer.summary()["signal"] == signal.SIGTERM and trainer.summary()["steps"] == 2
    assert "the step was interrupted and is not counted" in said
    assert f"SIGTERM: stopped after step 2 of 4; go on with out={tmp_path / 'broken'} resume=true" in said
    assert names(tmp_path / "broken") == ["step-000002"] and (tmp_path / "broken" / "adapter").is_dir()
    assert_same(go("broken", resume=True), unbroken)


def test_an_interrupt_before_the_first_step_leaves_the_adapter_of_the_run_that_goes_on(go, tmp_path, capsys):
    """As in a judge's ping. The weights there are those that the adapter began with."""
    def interrupted(trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        interrupt.check()
    before = adapter(go(total=2).log.run_dir)
    for name in ("run", "new"):
        trainer = go(name, begin=interrupted, resume=name == "run")
        assert trainer.summary()["signal"] == signal.SIGTERM
        assert "SIGTERM: stopped before its first step; go on with" in capsys.readouterr().out
    assert same_tensors(adapter(tmp_path / "run"), before) and not (tmp_path / "new" / "adapter").exists()
    assert go(resume=True).done == 4


@pytest.mark.parametrize("how", ["signal", "stop file", "max_minutes"])
def test_a_run_that_is_asked_to_end_finishes_its_step_and_keeps_it(go, tmp_path, capsys, monkeypatch, how):
    options, clock = {}, [0.0]
    if how == "signal":
        end, number, words = lambda: os.kill(os.getpid(), signal.SIGINT), signal.SIGINT, "SIGINT"
    elif how == "stop file":
        end, number, words = (tmp_path / "run" / "stop").touch, interrupt.BY_FILE, "stop file"
    else:
        options, number, words = {"max_minutes": 2.0}, 0, "max_minutes reached"
        real = module.time.monotonic
        monkeypatch.setattr(module.time, "monotonic", lambda: real() + clock[0])
        def end():
            clock[0] = 121.0
    trainer = go(hook=at(3, end), **options)
    assert trainer.summary()["steps"] == 3 and trainer.summary()["signal"] == number
    assert f"{words}: stopped after step 3 of 4" in capsys.readouterr().out
    assert names(tmp_path / "run") == ["step-000003"] and not (tmp_path / "run" / "stop").exists()
    again = go(resume=True)
    assert again.done == 4 and [r["step"] for r in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_rate_that_follows_the_clock_is_the_same_after_a_resume_at_the_same_time(go, capsys, monkeypatch):
    """20 steps of 15 s in 2 minutes: 8 of them; the broken run goes on at 60 s with a minute."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    def tick(place, step):
        clock[0] += 15.0 * (place == "after")

    def break_at_5(place, step):
        tick(place, step)
        at(5, fail)(place, step)
    options = {"total": 20, "lr_schedule": "linear", "warmup": 0.0, "hook": tick}
    unbroken = go("unbroken", max_minutes=2.0, **options)
    said = capsys.readouterr().out
    assert "max_minutes ends near step 8 of 20: the learning rate follows the clock" in said
    assert said.count("follows the clock") == 1 and "max_minutes reached: stopped after step 9 of 20" in said
    rates = [record["optim/lr"] for record in metrics(unbroken.log.run_dir)]
    assert rates[:3] == [1e-2, 1e-2 * 0.95, 1e-2 * 0.9] and rates[-2] < 0.2e-2 and rates == sorted(rates, reverse=True)
    with pytest.raises(OSError):
        go("broken", max_minutes=2.0, **options | {"hook": break_at_5})
    assert_same(go("broken", resume=True, max_minutes=1.0, **options), unbroken)


def test_what_is_no_exception_ends_the_process_without_a_save(go, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(hook=at(3, ctrl_c_outside_of_the_handlers))
    assert names(tmp_path / "run") == []


def test_an_error_before_the_first_step_is_the_one_that_is_heard(tiny_dir, data, tmp_path):
    cfg = make_config(SFTConfig, tiny_dir, data=data, out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="no problem fits"), Trainer(cfg, "sft"):
        raise UserError("no problem fits")
    assert names(tmp_path / "run") == []


def test_weights_that_are_not_finite_take_the_place_of_no_checkpoint(go, tmp_path, capsys):
    def spoil(where, step):
        if (where, step.number) == ("after", 3):
            with torch.no_grad():
                spoil.params[0][0, 0] = float("nan")
    real = module.Optimizer.__init__

    def keep(self, policy, *args):
        real(self, policy, *args)
        spoil.params = policy.params
    module.Optimizer.__init__ = keep
    try:
        with pytest.raises(UserError, match="NaN or infinities"):
            go(hook=spoil, save_every=1)
    finally:
        module.Optimizer.__init__ = real
    assert names(tmp_path / "run") == ["step-000002", "step-000001"] and not (tmp_path / "run" / "adapter").exists()
    assert "the steps since the last checkpoint can't be saved" in capsys.readouterr().out


# ---- saving

@pytest.fixture
def full_disk(monkeypatch):
    """Steps whose checkpoints can't be written."""
    steps, real = set(), checkpoint.save_checkpoint

    def save(run_dir, step, **options):
        if step in steps:
            raise UserError("cannot write: No space left on device")
        return real(run_dir, step, **options)
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    return steps


def test_a_save_that_fails_in_the_middle_is_said_and_the_run_goes_on(go, tmp_path, capsys, full_disk):
    full_disk |= {2, 3}
    go(total=5, save_every=1)
    assert names(tmp_path / "run") == ["step-000005", "step-000004", "step-000001"]
    said = capsys.readouterr().out
    for step in (2, 3):
        assert f"step {step} is not saved; the run goes on, and tries again at the next save: cannot write" in said


def test_a_save_that_fails_at_the_end_is_an_error(go, tmp_path, full_disk):
    full_disk |= {4}
    with pytest.raises(UserError, match="No space left"):
        go()


def test_a_rescue_that_fails_is_said_and_the_error_of_the_loop_is_raised(go, capsys, full_disk):
    full_disk |= {2}
    with pytest.raises(OSError, match="the drive is gone"):
        go(hook=at(3, fail))
    assert "the steps since the last checkpoint can't be saved: cannot write" in capsys.readouterr().out


# ---- evaluation within training

@pytest.fixture
def evaluations(monkeypatch):
    """evaluations(scores, do) -> the EvalConfigs asked for; scores: (accuracy, mean tokens) of each, then the last."""
    def script(scores, do=lambda n: None):
        asked = []

        def evaluate_policy(policy, examples, cfg, log):
            asked.append(cfg)
            do(len(asked))
            accuracy, tokens = scores[min(len(asked), len(scores)) - 1]
            return {"accuracy": accuracy, "mean_tokens": tokens, "interval": (0.0, 1.0), "problems": len(examples)}, []
        monkeypatch.setattr(module, "evaluate_policy", evaluate_policy)
        return asked
    return script


def test_the_best_checkpoint_is_kept_whatever_comes_after_and_among_equals_the_shorter_is_best(go, data, evaluations):
    evaluations([(0.5, 90), (0.7, 90), (0.7, 80), (0.7, 85), (0.6, 10), (0.5, 10), (0.1, 10)])
    trainer = go(total=7, eval_data=data, eval_every=1, save_every=1)
    assert best_checkpoint(trainer.log.run_dir).name == "step-000003"
    assert names(trainer.log.run_dir) == [f"step-00000{n}" for n in (7, 6, 5, 3)]
    assert [(r["eval/accuracy"], r["eval/tokens"]) for r in metrics(trainer.log.run_dir) if "eval/accuracy" in r] == [
        (0.5, 90), (0.7, 90), (0.7, 80), (0.7, 85), (0.6, 10), (0.5, 10), (0.1, 10)]


BEST = {"cls": RLAIFConfig, "eval_every": 1, "save_every": 1}  # 24 problems: a standard error is about 0.1


@pytest.mark.parametrize("scores, best", [
    ([(0.5, 90), (0.5, 80), (0.45, 60), (0.3, 20)], 2),  # within a standard error of the highest the shortest
    ([(0.5, 90), (0.45, 60), (0.8, 85), (0.75, 70)], 3),  # a higher one puts out what is no longer within it
    ([(0.5, 90), (0.2, 10), (0.1, 10), (0.1, 10)], 0),  # what it began with, where nothing holds its accuracy
    ([(0.5, 90), (0.6, 90), (0.55, 90), (0.5, 95)], 2),  # of equals the newest
    ([(0.5, 90), (0.6, 70), (0.58, 60), (0.6, 50)], 3),
    ([(1.0, 90), (0.97, 40), (0.8, 10), (0.8, 10)], 1),  # an accuracy of 1 has an error, too
    ([(0.08, 90), (0.04, 3), (0.0, 3), (0.04, 3)], 0),  # a small one allows no half of it
])
def test_the_shortest_within_a_standard_error_of_the_highest_accuracy_is_handed_on(go, data, evaluations, scores, best,
                                                                                   capsys):
    evaluations(scores)
    trainer = go(total=3, eval_data=data, **BEST)
    kept = best_checkpoint(trainer.log.run_dir)
    assert kept.name == f"step-00000{best}"
    assert same_tensors(adapter(trainer.log.run_dir), load_file(kept / "adapter_model.safetensors"))
    assert ("the adapter left is that after step" in capsys.readouterr().out) == (best < 3)


def test_the_last_is_handed_on_where_it_is_asked_for_and_in_stage_1(go, data, evaluations):
    for name, options in (("rl", {"final": "last"}), ("sft", {"cls": SFTConfig})):
        evaluations([(0.5, 90), (0.9, 80), (0.2, 10)])
        trainer = go(name, total=3, **{**BEST, "eval_data": data, **options})
        assert best_checkpoint(trainer.log.run_dir).name != "step-000003"
        last = list_checkpoints(trainer.log.run_dir)[0]
        assert last.name == "step-000003"
        assert same_tensors(adapter(trainer.log.run_dir), load_file(last / "adapter_model.safetensors"))


def test_resumed_after_the_first_evaluation_it_is_not_made_again_and_the_best_is_the_same(go, data, evaluations):
    scores = [(0.5, 90), (0.55, 60), (0.2, 10), (0.5, 70)]
    evaluations(scores)
    unbroken = go("unbroken", total=3, eval_data=data, **BEST)
    asked = evaluations(scores)
    with pytest.raises(OSError):
        go("broken", total=3, eval_data=data, hook=at(1, fail), **BEST)
    with pytest.raises(OSError):
        go("broken", total=3, eval_data=data, hook=at(3, fail), resume=True, **BEST)
    again = go("broken", total=3, eval_data=data, resume=True, **BEST)
    assert len(asked) == 4 and vars(again.best) == vars(unbroken.best) and again.best.best["tokens"] == 60
    assert_same(again, unbroken)


def test_a_best_checkpoint_that_could_not_be_written_is_not_the_mark_for_the_next(go, data, evaluations, full_disk):
    evaluations([(0.5, 10), (0.9, 10), (0.7, 10)])
    full_disk |= {2}
    trainer = go(total=3, eval_data=data, eval_every=1)
    assert best_checkpoint(trainer.log.run_dir).name == "step-000003"


def test_an_evaluation_that_was_interrupted_is_owed_and_the_run_that_goes_on_begins_with_it(go, data, evaluations,
                                                                                            capsys):
    def interrupted(n):
        if n == 1:
            os.kill(os.getpid(), signal.SIGINT)
            interrupt.check()
    options = {"eval_data": data, "eval_every": 2}
    evaluations([(0.5, 10), (0.4, 10)])
    unbroken = go("unbroken", **options)
    asked = evaluations([(0.0, 0), (0.5, 10), (0.4, 10)], interrupted)
    trainer = go("broken", **options)
    assert trainer.done == 2 and trainer.owed and len(asked) == 1
    assert "the evaluation was interrupted" in capsys.readouterr().out
    again = go("broken", resume=True, **options)
    assert len(asked) == 3 and not again.owed
    assert best_checkpoint(again.log.run_dir).name == best_checkpoint(unbroken.log.run_dir).name == "step-000002"
    assert_same(again, unbroken)


def test_an_evaluation_that_was_made_up_for_is_owed_no_longer(go, data, evaluations):
    def interrupted(n):
        if n == 2:
            os.kill(os.getpid(), signal.SIGINT)
            interrupt.check()
    options = {"eval_data": data, "eval_every": 1, "total": 3}
    asked = evaluations([(0.5, 10), (0.0, 0), (0.4, 10), (0.3, 10)], interrupted)
    go(**options)
    with pytest.raises(OSError):
        go(hook=at(3, fail), resume=True, **options)
    trainer = go(resume=True, **options)
    evaluated = [(r["step"], r["eval/accuracy"]) for r in metrics(trainer.log.run_dir) if "eval/accuracy" in r]
    assert len(asked) == 4 and evaluated == [(1, 0.5), (2, 0.4), (3, 0.3)]
    assert best_checkpoint(trainer.log.run_dir).name == "step-000001"


@pytest.mark.parametrize("cls", [SFTConfig, RLAIFConfig])
def test_the_evaluation_uses_the_run_s_own_options_in_both_stages(go, data, evaluations, cls):
    asked = evaluations([(0.5, 10)])
    options = {"max_prompt_len": 77, "max_num_seqs": 3, "rollout": "transformers", "stop_boxed": True, "loop_guard": 16,
               "system": "be brief", "attn": "eager", "seed": 5}
    go(total=1, cls=cls, eval_data=data, eval_every=1, eval_max_new_tokens=33, **options)
    cfg, *more = asked
    assert more == [cfg] * (cls is RLAIFConfig)  # stage 2 evaluates what it begins with
    assert {name: cfg.value(name) for name in options} == options
    assert cfg.sampling.max_new_tokens == 33 and cfg.sampling.temperature == 0 and cfg.samples == 1
    assert cfg.prompt.prompt_template == "{problem}" and cfg.model.dtype == "fp32"


@pytest.mark.parametrize("stage", ["sft", "rlaif"])
def test_the_run_s_own_options_decide_what_an_evaluation_samples(train, rl, monkeypatch, stage, capsys):
    """Really sampled: prompts over max_prompt_len are left out and said, and the engine of the run is asked."""
    opened, real = [], evaluate.open_engine
    monkeypatch.setattr(evaluate, "open_engine", lambda engine, *args, **options: opened.append(engine) or real(
        engine, *args, **options))
    held_out = [{"problem": "too long " * 40, "answer": "1"}, {"problem": "1 + 1?", "answer": "2"}]
    options = {"eval_data": held_out, "eval_every": 1, "eval_max_new_tokens": 5, "steps": 1, "max_prompt_len": 70,
               "max_num_seqs": 3}
    run_dir = rl(**options) if stage == "rlaif" else train(**options)[1]
    records = [r for r in metrics(run_dir) if "eval/accuracy" in r]
    assert [r["step"] for r in records] == ([0, 1] if stage == "rlaif" else [1])
    assert all(0 < r["eval/tokens"] <= 2.5 for r in records)  # of two problems, one was sampled
    assert "1 problems are longer than max_prompt_len=70 and count as wrong" in capsys.readouterr().out
    assert [engine.max_num_seqs for engine in opened] == [3] * len(records) and list_checkpoints(run_dir)


def test_a_run_whose_rollouts_a_vllm_server_samples_evaluates_in_this_process(train, data):
    _, run_dir = train(eval_data=data, eval_every=1, eval_limit=2, eval_max_new_tokens=2, steps=1, rollout="vllm",
                       vllm_url="http://127.0.0.1:9/v1")
    assert [r["step"] for r in metrics(run_dir) if "eval/accuracy" in r] == [1]


def test_an_evaluation_without_problems_is_refused(go):
    with pytest.raises(UserError, match="set eval_data="):
        go(eval_every=2)


def test_held_out_rows_that_are_left_out_are_said_and_so_is_that_none_is_evaluated(go, data, tmp_path, capsys):
    rows = [json.loads(line) for line in open(data)]
    del rows[1]["answer"], rows[1]["solution"]
    go(total=1, eval_data=rows, eval_every=1, eval_limit=3, eval_max_new_tokens=2)
    assert "eval_data: 3 rows kept, 1 skipped: 1 x no answer" in capsys.readouterr().out
    go("off", total=1, eval_data=data)
    assert "eval_data without eval_every=N: nothing is evaluated in training" in capsys.readouterr().out
    go("best", total=1, final="best")  # which stage 2 has by itself
    assert "final without eval_every=N" in capsys.readouterr().out
    go("rl", total=1, cls=RLAIFConfig)
    assert "eval_every" not in capsys.readouterr().out


# ---- resume

def test_an_existing_run_folder_is_refused_and_untouched(go, tmp_path):
    go(total=1)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="resume=true"):
        go(total=1)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_resume_without_a_folder_is_refused(tiny_dir, data):
    cfg = make_config(SFTConfig, tiny_dir, data=data, resume=True)
    with pytest.raises(UserError, match="out="), Trainer(cfg, "sft"):
        pass


def test_a_resume_says_what_changed_drops_lost_steps_and_goes_past_a_damaged_checkpoint(go, tmp_path, capsys):
    unbroken = go("unbroken", save_every=1)
    go("damaged", total=3, save_every=1)
    (tmp_path / "damaged" / "checkpoints" / "step-000003" / "state.json").write_text("{}")
    capsys.readouterr()
    with pytest.warns(UserWarning, match="step-000003 is damaged"):
        again = go("damaged", resume=True, save_every=1, max_minutes=60.0)
    said = capsys.readouterr().out
    assert "options changed since the checkpoint: max_minutes 0.0 -> 60.0" in said and "resumed after step 2" in said
    assert_same(again, unbroken)


def test_a_resume_that_is_refused_leaves_the_options_of_the_run_as_they_were(go, tmp_path):
    go(total=1)
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match="saved by another adapter"):
        go(total=1, resume=True, lora_r=3)
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    go(total=2, resume=True, lr=1e-3)
    assert "lr: 0.001\n" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_best_checkpoint_that_a_resume_went_past_hides_none_before_it(go, data, evaluations, tmp_path):
    scores = [(0.5, 90), (0.6, 80), (0.6, 70), (0.5, 60), (0.1, 50)]
    evaluations(scores)
    unbroken = go("unbroken", total=4, eval_data=data, **BEST)
    evaluations(scores)
    go("damaged", total=2, eval_data=data, **BEST)
    (tmp_path / "damaged" / "checkpoints" / "step-000002" / "state.json").write_text("{}")
    evaluations([(0.1, 50)] + scores[3:])  # on a card step 2 is not the same again
    with pytest.warns(UserWarning, match="step-000002 is damaged"):
        again = go("damaged", total=4, eval_data=data, resume=True, **BEST)
    assert again.best.best["step"] == 1 and again.best.highest == 0.6 and unbroken.best.best["step"] == 2
    assert best_checkpoint(again.log.run_dir).name == "step-000001"


def test_a_resume_before_the_first_checkpoint_starts_again(go, tmp_path, capsys):
    unbroken = go("unbroken")
    with pytest.raises(OSError):
        go("broken", hook=at(1, fail))
    again = go("broken", resume=True)
    assert "no checkpoint yet: starting from step 0" in capsys.readouterr().out
    assert_same(again, unbroken)


@pytest.mark.parametrize("where", ["rollout", "verifier"])
def test_a_function_of_the_user_s_that_fails_late_costs_no_step(rl, where):
    """The verifier throws dice, and the last ones are taken back: resumed, the run is an unbroken one."""
    state = {"broken_from": 10**9, "calls": 0}

    def fickle(text, example):
        state["calls"] += 1
        if state["calls"] >= state["broken_from"]:
            raise OSError("no sandbox")
        return even(text, example) != (random.random() < 0.2)
    options = {"verifier": fickle, "steps": 3, "updates_per_rollout": 2 if where == "rollout" else 1}
    unbroken = rl("unbroken", **options)
    state |= {"broken_from": state["calls"] - 2, "calls": 0}
    with pytest.raises(UserError, match="verifier=fickle raised OSError: no sandbox"):
        rl("broken", **options)
    state |= {"broken_from": 10**9}
    assert names(unbroken.parent / "broken") == ["step-000002"]
    broken = rl("broken", resume=True, **options)
    assert without_times(metrics(broken)) == without_times(metrics(unbroken))
    assert same_tensors(adapter(broken), adapter(unbroken))


# ---- the best checkpoint: what may come between

def test_the_end_is_evaluated_before_the_best_is_handed_on_also_where_no_evaluation_was_due(go, data, evaluations):
    """With eval_every=3 and 2 steps that before the first step would be the best of one."""
    for scores, best in (([(0.5, 90), (0.6, 80)], 2), ([(0.5, 90), (0.1, 80)], 0)):
        asked = evaluations(scores)
        trainer = go(f"best-{best}", total=2, eval_data=data, **BEST | {"eval_every": 3})
        assert len(asked) == 2 and best_checkpoint(trainer.log.run_dir).name == f"step-00000{best}"


def test_stopped_before_anything_but_the_beginning_was_evaluated_the_last_is_handed_on(go, data, evaluations):
    evaluations([(0.5, 90)])
    trainer = go(total=9, eval_data=data, hook=at(2, lambda: os.kill(os.getpid(), signal.SIGINT)),
                 **BEST | {"eval_every": 5})
    assert same_tensors(adapter(trainer.log.run_dir),
                        load_file(list_checkpoints(trainer.log.run_dir)[0] / "adapter_model.safetensors"))
    assert names(trainer.log.run_dir)[0] == "step-000002"


def test_a_damaged_best_checkpoint_is_said_and_not_handed_on(go, data, evaluations, tmp_path, capsys):
    def spoil():
        (tmp_path / "run" / "checkpoints" / "step-000000" / "adapter_model.safetensors").write_bytes(b"")
    evaluations([(0.9, 10), (0.1, 90)])
    trainer = go(total=2, eval_data=data, hook=at(2, spoil), **BEST)
    assert "step-000000, the best, is damaged (adapter_model" in capsys.readouterr().out
    assert same_tensors(adapter(trainer.log.run_dir),
                        load_file(list_checkpoints(trainer.log.run_dir)[0] / "adapter_model.safetensors"))


def test_a_first_evaluation_that_is_not_saved_is_made_again_and_stands_in_the_metrics_once(go, data, evaluations,
                                                                                           full_disk):
    asked = evaluations([(0.5, 90), (0.5, 90), (0.6, 80)])
    full_disk.add(0)
    with pytest.raises(OSError):
        go(total=1, eval_data=data, hook=at(1, fail), **BEST)
    full_disk.clear()
    again = go(total=1, eval_data=data, resume=True, **BEST)
    assert len(asked) == 3 and [r["step"] for r in metrics(again.log.run_dir) if "eval/tokens" in r] == [0, 1]


def rewritten(run_dir, change):
    """Rewrite the state of all checkpoints, their manifests too."""
    for folder in list_checkpoints(run_dir):
        state = json.loads((folder / "state.json").read_text())
        change(state)
        (folder / "state.json").write_text(json.dumps(state))
        manifest = json.loads((folder / "manifest.json").read_text())
        data = (folder / "state.json").read_bytes()
        del manifest["sha256"]  # as before manifests held their own hash
        manifest["files"]["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))


def test_evaluations_of_other_problems_are_forgotten(go, data, evaluations):
    evaluations([(0.9, 90), (0.8, 80)])
    with pytest.raises(OSError):
        go(total=3, eval_data=data, hook=at(2, fail), **BEST)
    evaluations([(0.3, 95), (0.2, 99)])
    again = go(total=3, eval_data=data, eval_limit=5, resume=True, **BEST)
    assert again.best.highest == 0.3 and best_checkpoint(again.log.run_dir).name == "step-000002"


def test_a_run_of_an_older_minimath_goes_on_and_its_next_evaluation_is_the_first(go, data, tmp_path, evaluations,
                                                                                     full_disk):
    """Its states have a number as `best`."""
    def older(state):
        state["best"] = 0.493
    evaluations([(0.5, 90), (0.6, 80), (0.3, 95), (0.2, 95), (0.3, 95)])
    with pytest.raises(OSError):
        go(total=5, eval_data=data, hook=at(3, fail), **BEST)
    run_dir = tmp_path / "run"
    rewritten(run_dir, older)
    full_disk.add(3)  # and the state of the best checkpoint, to which it goes back then, is as old
    evaluations([(0.3, 95), (0.2, 90), (0.3, 80)])
    again = go(total=5, eval_data=data, resume=True, **BEST)
    assert again.done == 5 and again.best.best == {"step": 5, "accuracy": 0.3, "tokens": 80, "problems": 24,
                                                   "highest": 0.3}
    assert best_checkpoint(run_dir).name == "step-000005"
