"""thinking_budget: a thought that reaches it is ended, the answer begun, and everything else stays as it was."""
import shutil

import pytest
from thinking import CHATML, R1
from toy import make_config, policy_of, write_problems

from minimath.config.schema import EngineOptions, EvalConfig, SamplingOptions
from minimath.core.errors import UserError
from minimath.eval.budget import FORCED, limited_stream
from minimath.eval.evaluate import evaluate
from minimath.eval.partial import refuse_changes
from minimath.rollout.open import open_engine


@pytest.fixture
def engine(tiny_dir):
    """engine(template, **sampling): of a random model, whose completions end by luck alone."""
    def engine(template, **sampling):
        policy = policy_of(tiny_dir)
        policy.tokenizer.chat_template = template
        return open_engine(EngineOptions(), SamplingOptions(**{"max_new_tokens": 40, "temperature": 1.0} | sampling),
                           policy, seed=3)
    return engine


def sampled(engine, budget: int, problems=("1+1?", "2 + 3 = ?"), **options) -> dict:
    prompts = [engine.policy.prompt_ids(problem) for problem in problems]
    return {(p, s): sample for came in limited_stream(engine, budget, prompts, 2, **options) for p, s, sample in came}


def test_a_thought_ends_at_its_budget_and_the_answer_goes_on_within_max_new_tokens(engine):
    opened = engine(R1)
    put_in = opened.policy.tokenizer(FORCED, add_special_tokens=False)["input_ids"]
    free, limited = sampled(opened, 0), sampled(opened, 9)
    assert free.keys() == limited.keys() and opened.max_new_tokens == 40
    for place, sample in limited.items():
        whole = free[place]
        assert whole.thought == whole.tokens > 9  # a random model never ends its thought
        assert sample.ids[:9] == whole.ids[:9] and sample.ids[9:9 + len(put_in)] == put_in
        assert 9 + len(put_in) < sample.tokens <= 40 and (sample.finished or sample.tokens == 40)
        assert len(sample.logp) == sample.tokens and sample.logp[9:9 + len(put_in)] == [0.0] * len(put_in)
        assert opened.policy.decode(sample.ids[:sample.thought]).endswith("</think>") and not sample.cut_thinking
        assert "\\boxed{" in sample.text
    again = sampled(opened, 9, ["2 + 3 = ?"], keys=[1], skip={(0, 1)})  # alone, as a resume samples what is left
    assert again.keys() == {(0, 0)} and again[0, 0].ids == limited[1, 0].ids


def test_the_rest_of_a_completion_has_random_numbers_of_its_own(engine, monkeypatch):
    opened, asked = engine(R1), []
    jobs = opened.jobs
    monkeypatch.setattr(opened, "jobs", lambda *args: asked.append(jobs(*args)) or asked[-1])
    sampled(opened, 9)
    seeds = [job.seed for jobs in asked for job in jobs]
    assert len(set(seeds)) == len(seeds) == 8  # of 2 problems, 2 samples and 2 parts


def test_a_completion_without_a_thought_is_the_same_under_any_budget(engine):
    plain = engine(CHATML, temperature=0.0)
    free, limited = sampled(plain, 0), sampled(plain, 9)
    assert {place: sample.ids for place, sample in limited.items()} == {place: s.ids for place, s in free.items()}
    assert any(sample.tokens > 9 for sample in free.values())


def test_a_budget_that_leaves_nothing_for_the_answer_is_refused(engine, tiny_dir):
    with pytest.raises(UserError, match="nothing of max_new_tokens=40"):
        sampled(engine(R1), 39)
    assert "larger max_new_tokens" in EvalConfig(thinking_budget=512).check()


def test_an_evaluation_says_how_many_reached_the_budget(tiny_dir, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_dir, folder)
    (folder / "chat_template.jinja").write_text(R1)
    summary = evaluate(make_config(EvalConfig, str(folder), data=write_problems(tmp_path / "p.jsonl", n=3),
                                   max_new_tokens=40, thinking_budget=9, out=str(tmp_path / "eval")))
    assert summary["forced"] == summary["thinking"] == 1.0 and summary["mean_thought_tokens"] > 9
    assert "100% reached thinking_budget=9" in capsys.readouterr().out


def test_an_evaluation_of_an_older_minimath_goes_on_where_new_options_are_at_their_defaults(tmp_path):
    decides = {"system": "", "thinking": "auto", "template_args": "", "thinking_budget": 0}
    (tmp_path / "fingerprint.json").write_text('{"system": ""}')
    refuse_changes(tmp_path, decides)
    with pytest.raises(UserError, match="thinking_budget was 0 and is 9"):
        refuse_changes(tmp_path, decides | {"thinking_budget": 9})
