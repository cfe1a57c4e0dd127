"""Thoughts: the template's switch, what is trained of rows with and without them, and dates in prompts."""
import random

import pytest
from thinking import ALL, CHATML, GRANITE, LFM2, QWEN3, QWEN35, R1, SMOLLM3, thinker
from tiny import tiny_tokenizer

from minimath.core.errors import UserError
from minimath.core.run_folder import say_once
from minimath.data.chat import encode, eos_ids, preflight, prompt_ids, turn_end
from minimath.data.examples import Example

OPENED = "<|im_start|>assistant\n<think>\n"

PLAIN = Example("2+3?", "\\boxed{5}")
THINKS = Example("2+3?", "<think>\nhm\n</think>\n\n\\boxed{5}")
FIELD = Example("2+3?", messages=[{"role": "user", "content": "2+3?"},
                                  {"role": "assistant", "content": "\\boxed{5}", "reasoning_content": "hm"}])
TALK = Example("", messages=[*FIELD.messages, {"role": "user", "content": "+1?"},
                             {**FIELD.messages[1], "content": "6"}])


def parts(tokenizer, example, **options) -> tuple[str, str]:
    """The text that is not trained and the text that is; the prompt's ids begin the row."""
    row = encode(tokenizer, example, prompt_template="{problem}", max_len=999, **options)
    prompt = prompt_ids(tokenizer, example, prompt_template="{problem}", **options)
    assert row.ids[:len(prompt)] == prompt and not any(row.loss_mask[:len(prompt)]) and row.loss_mask[len(prompt)]
    return tuple(tokenizer.decode([i for i, trained in zip(row.ids, row.loss_mask) if trained == wanted])
                 for wanted in (False, True))


@pytest.mark.parametrize("family, thinking, plain, thinks", [
    ("Qwen3", "auto", "<think>\n\n</think>\n\n\\boxed{5}", "<think>\nhm\n</think>\n\n\\boxed{5}"),
    ("Qwen3", "on", "<think>\n\n</think>\n\n\\boxed{5}", "<think>\nhm\n</think>\n\n\\boxed{5}"),
    ("Qwen3", "off", "\\boxed{5}", None),
    ("Qwen3.5-4B", "auto", "\n</think>\n\n\\boxed{5}", "hm\n</think>\n\n\\boxed{5}"),
    ("Qwen3.5-4B", "off", "\\boxed{5}", None),
    ("Qwen3.5-0.8B", "auto", "\\boxed{5}", None),
    ("Qwen3.5-0.8B", "on", "\n</think>\n\n\\boxed{5}", "hm\n</think>\n\n\\boxed{5}"),
    ("R1-Distill", "auto", "\n</think>\n\n\\boxed{5}", "hm\n</think>\n\n\\boxed{5}"),
    ("R1-Distill", "on", "\n</think>\n\n\\boxed{5}", "hm\n</think>\n\n\\boxed{5}"),
    ("SmolLM3", "auto", "\\boxed{5}", "<think>\nhm\n</think>\n\n\\boxed{5}"),
    ("SmolLM3", "off", "\\boxed{5}", None),
    ("Granite-3.3", "on", "\\boxed{5}", "<think>\nhm\n</think>\n\n\\boxed{5}"),
    ("LFM2.5", "auto", "\\boxed{5}", "<think>\nhm\n</think>\n\n\\boxed{5}"),
    ("Phi-4-mini, Gemma-3", "off", "\\boxed{5}", "<think>\nhm\n</think>\n\n\\boxed{5}")])
def test_what_the_model_writes_is_trained_and_what_the_prompt_holds_is_not(family, thinking, plain, thinks):
    tokenizer = thinker(ALL[family])
    assert parts(tokenizer, PLAIN, thinking=thinking)[1] == plain + "<|im_end|>"
    for example in (THINKS, FIELD, TALK):
        if thinks is None:
            advice = "set thinking=on" if thinking != "on" else "take the thoughts out"
            with pytest.raises(UserError, match=f"thinking={thinking} the chat template ends the thoughts.*{advice}"):
                parts(tokenizer, example, thinking=thinking)
            continue
        trained = parts(tokenizer, example, thinking=thinking)[1].replace(" ", "")
        wanted = thinks.replace("\\boxed{5}", "6") if example is TALK else thinks
        if family == "LFM2.5" and example is not THINKS:  # it reads the field and writes it without line ends
            wanted = wanted.replace("\n", "")
        assert trained == wanted + "<|im_end|>"


def test_the_switch_is_in_the_prompt_whatever_its_name():
    for family, name in (("Qwen3", "enable_thinking"), ("SmolLM3", "enable_thinking"), ("Granite-3.3", "thinking")):
        tokenizer = thinker(ALL[family])
        for thinking, value in (("on", True), ("off", False)):
            said = tokenizer.decode(prompt_ids(tokenizer, "p", prompt_template="{problem}", thinking=thinking))
            wanted = tokenizer.apply_chat_template([{"role": "user", "content": "p"}], tokenize=False,
                                                   add_generation_prompt=True, **{name: value})
            assert said.split("user")[1] == wanted.split("user")[1] and ("/no_think" in said) == ("/no_think" in wanted)
            given = prompt_ids(tokenizer, "p", prompt_template="{problem}", template_args=f"{name}={thinking}")
            assert tokenizer.decode(given) == said


@pytest.mark.parametrize("template, options, says", [
    (R1, {"thinking": "off"}, "no switch"), (LFM2, {"thinking": "on"}, "no switch"),
    (CHATML, {"thinking": "on"}, "template_args=NAME=VALUE"), (None, {"thinking": "on"}, "no switch"),
    (QWEN3, {"template_args": "effort=high"}, "reads no effort"),
    (QWEN3, {"template_args": "date=2026-02-03"}, "reads no date")])
def test_what_the_template_does_not_read_is_refused(template, options, says):
    with pytest.raises(UserError, match=says):
        prompt_ids(thinker(template), "p", prompt_template="{problem}", **options)


def test_a_token_across_the_border_of_prompt_and_thought_is_split_there():
    tokenizer = thinker(QWEN35.replace(".strip()", ""), "\n\n\n")
    example = Example("", messages=[FIELD.messages[0], {**FIELD.messages[1], "reasoning_content": "\n\nhm"}])
    text = "<think>\n\n\nhm\n</think>\n\n\\boxed{5}"
    assert tokenizer.convert_tokens_to_ids("\n\n\n") in tokenizer(text)["input_ids"]  # else this test shows nothing
    given, trained = parts(tokenizer, example)
    assert given.endswith(OPENED) and trained == "\n\nhm\n</think>\n\n\\boxed{5}<|im_end|>"


def test_a_completion_that_began_inside_the_thought_keeps_the_ids_that_were_sampled():
    for template in (QWEN35, R1):
        tokenizer, sampled = thinker(template), "hm</think>5"
        row = encode(tokenizer, Example("2+3?", sampled), prompt_template="{problem}", max_len=999)
        prompt = prompt_ids(tokenizer, "2+3?", prompt_template="{problem}")
        assert row.ids == [*prompt, *tokenizer(sampled)["input_ids"], turn_end(tokenizer)]


def test_tags_that_are_special_tokens_stay_in_a_solution_and_not_in_a_problem():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert parts(tokenizer, THINKS)[1] == "<think>\nhm\n</think>\n\n\\boxed{5}<|im_end|>"
    assert "<think>" not in tokenizer.decode(prompt_ids(tokenizer, "a <think>", prompt_template="{problem}"))


def test_preflight_tells_of_thoughts_that_are_trained_to_be_empty():
    for thinking, said in (("auto", True), ("off", False)):
        tokenizer = thinker(QWEN3)
        row = encode(tokenizer, PLAIN, prompt_template="{problem}", thinking=thinking, max_len=999)
        assert ("thinking=off puts" in preflight(tokenizer, [row], eos=eos_ids(tokenizer))) == said


def test_dates_and_random_words_of_a_template_are_the_same_on_every_day(capsys):
    say_once.cache_clear()
    tokenizer = thinker(SMOLLM3 + "{{ ['a', 'b', 'c', 'd', 'e', 'f']|random }}")
    asked = []
    for seed in range(20):  # of other runs
        random.seed(seed)
        state = random.getstate()
        asked.append(tokenizer.decode(prompt_ids(tokenizer, "p", prompt_template="{problem}")))
        assert random.getstate() == state
    assert len(set(asked)) == 1 and "Today: 01 January 2026 /think" in asked[0]
    assert capsys.readouterr().err.count("always 2026-01-01") == 1
    given = prompt_ids(tokenizer, "p", prompt_template="{problem}", template_args="date=2027-02-03")
    assert "Today: 03 February 2027" in tokenizer.decode(given)
    assert "2026" in tokenizer.decode(prompt_ids(thinker(GRANITE), "p", prompt_template="{problem}"))


def test_a_template_that_leaves_system_messages_out_is_told(capsys):
    say_once.cache_clear()
    for condition, said in (("true", 0), ("m['role'] != 'system'", 1)):
        tokenizer = thinker("{% for m in messages if " + condition + " %}{{ m['content'] }}{% endfor %}")
        for system in ("", "Be brief."):
            prompt_ids(tokenizer, "p", system=system, prompt_template="{problem}")
        assert capsys.readouterr().err.count("leaves system messages out") == said


def test_of_several_templates_the_default_is_meant():
    tokenizer, plain = thinker(SMOLLM3), thinker(SMOLLM3)
    tokenizer.chat_template = {"tool_use": QWEN35, "default": SMOLLM3}
    for options in ({}, {"template_args": "date=2027-02-03"}, {"thinking": "off"}):
        one, other = (prompt_ids(each, "p", prompt_template="{problem}", **options) for each in (tokenizer, plain))
        assert one == other
