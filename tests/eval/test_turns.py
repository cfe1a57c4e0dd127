"""Rows of several turns: evaluation, sampling and stage 2 ask with all of them, and training takes them back."""
import json

import pytest
from toy import make_config, policy_of

import minimath.eval.evaluate as module
from minimath.config.schema import EvalConfig, RLAIFConfig
from minimath.core.errors import UserError
from minimath.data.examples import load_examples
from minimath.eval.sample import SampleConfig, kept_rows
from minimath.train.rollouts import encode_problems

TALK = [{"role": "system", "content": "Answer in base 7."}, {"role": "user", "content": "x is 6."},
        {"role": "assistant", "content": "Noted."}, {"role": "user", "content": "What is x+1?"}]
ROWS = [{"messages": TALK, "answer": "10"}, {"messages": [*TALK, {"role": "assistant", "content": "\\boxed{10}"}]},
        {"messages": TALK[1:2], "answer": "6"}, {"problem": "2+3?", "answer": "5"}]


@pytest.fixture
def asked(tiny_tokenizer):
    """What each row must ask; the prompt_template is for the last alone."""
    talks = [TALK, TALK, TALK[1:2], [{"role": "user", "content": "Q: 2+3?"}]]
    return [tiny_tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in talks]


def test_an_evaluation_asks_with_all_turns(tiny_dir, tmp_path, monkeypatch, asked, tiny_tokenizer):
    seen, real = [], module.sample_completions
    monkeypatch.setattr(module, "sample_completions", lambda *args: seen.append(args[1]) or real(*args))
    module.evaluate(make_config(EvalConfig, tiny_dir, data=ROWS, max_new_tokens=2, prompt_template="Q: {problem}",
                                out=str(tmp_path / "out")))
    assert [tiny_tokenizer.decode(prompt) for prompt in seen[0].values()] == asked


def test_an_evaluation_does_not_go_on_with_other_turns_around_the_same_question(tiny_dir, tmp_path):
    def of(system):
        talk = [{"role": "system", "content": system}, *TALK[1:2]]
        return make_config(EvalConfig, tiny_dir, data=[{"messages": talk, "answer": "6"}], max_new_tokens=2,
                           out=str(tmp_path / "out"), resume=(tmp_path / "out").exists())

    first, again = (module.evaluate(of("Answer in base 7.")) for _ in range(2))
    assert again["tokens_per_s"] == first["tokens_per_s"]
    with pytest.raises(UserError, match="data was '1 problems"):
        module.evaluate(of("Answer in base 10."))


def test_stage_2_asks_with_all_turns(tiny_dir, asked, tiny_tokenizer):
    cfg = make_config(RLAIFConfig, tiny_dir, prompts_per_step=1, prompt_template="Q: {problem}")
    policy = policy_of(tiny_dir, prompt_template="Q: {problem}")
    problems = encode_problems(cfg, policy, *load_examples(ROWS), say=lambda text: None)
    assert [tiny_tokenizer.decode(prompt) for _, prompt in problems] == asked


def test_sampled_solutions_of_several_turns_are_rows_of_messages(tiny_dir, tmp_path):
    module.evaluate(make_config(EvalConfig, tiny_dir, data=ROWS, max_new_tokens=2, out=str(tmp_path / "out")))
    records = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    solved = [record | {"correct": True, "finished": True, "text": f"so {record['gold']}"} for record in records]
    rows, _ = kept_rows(solved, make_config(SampleConfig, tiny_dir, data=ROWS, out=str(tmp_path / "sample")))
    examples, report = load_examples(rows, need=("solution", "answer"))
    assert [e.messages and e.asked() for e in examples] == [TALK, TALK, TALK[1:2], None]
    assert [e.solution for e in examples] == ["so 10", "so 10", "so 6", "so 5"] and not report.unread
