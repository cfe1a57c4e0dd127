"""One BOS, a trained EOS, the right mask under several templates, packing without cross attention."""
import functools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model, tiny_tokenizer
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from minimath.core.errors import UserError
from minimath.data.batch import collate_packed, collate_padded, pack
from minimath.data.chat import (
    IGNORE,
    Encoded,
    encode,
    eos_ids,
    final_text,
    preflight,
    prompt_ids,
    turn_end,
)
from minimath.data.examples import Example

TEMPLATE = "{problem}\nPut the final answer in \\boxed{{}}."
EXAMPLE = Example("What is 2 + 3?", "2 + 3 = 5. \\boxed{5}", "5")
SMOLLM2 = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
           "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
           "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
           "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
WITH_BOS = ("{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
MERGING = ("{% for m in messages %}{{ m['role'] + ' ap' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
           "{% if add_generation_prompt %}{{ 'assistant ap' }}{% endif %}")
THINKING = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
            "{{ m['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}")


def make_tokenizer(template: str | None, *, bos: bool = False):
    """The tiny tokenizer under another template; bos: it has a BOS and adds it by itself, as Llama's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if bos:
        tokenizer.bos_token = "<|endoftext|>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)])
    return tokenizer


def encoded(tokenizer, example: Example = EXAMPLE, **options) -> Encoded:
    return encode(tokenizer, example, **{"prompt_template": TEMPLATE, "max_len": 2048, **options})


def trained_text(tokenizer, row: Encoded) -> str:
    return tokenizer.decode([i for i, trained in zip(row.ids, row.loss_mask) if trained])


def prompt_text(tokenizer, row: Encoded) -> str:
    return tokenizer.decode([i for i, trained in zip(row.ids, row.loss_mask) if not trained])


@pytest.mark.parametrize("template", [tiny_tokenizer().chat_template, SMOLLM2, WITH_BOS, None],
                         ids=["chatml", "smollm2", "bos", "no-template"])
@pytest.mark.parametrize("bos", [False, True])
def test_prompt_is_untrained_solution_and_eos_are_trained_and_one_bos_at_most(template, bos):
    tokenizer = make_tokenizer(template, bos=bos)
    row = encoded(tokenizer)
    prompt = prompt_ids(tokenizer, EXAMPLE.problem, prompt_template=TEMPLATE)
    assert row.ids[:len(prompt)] == prompt and not any(row.loss_mask[:len(prompt)]) and all(row.loss_mask[len(prompt):])
    assert trained_text(tokenizer, row) == EXAMPLE.solution + "<|im_end|>"
    assert row.ids.count(tokenizer.bos_token_id) == (1 if bos else 0)
    assert not bos or row.ids[0] == tokenizer.bos_token_id
    assert "[[" in preflight(tokenizer, [row], eos=eos_ids(tokenizer))


def test_bos_that_opens_every_turn_is_accepted_once_per_turn_but_not_doubled():
    tokenizer = make_tokenizer(SMOLLM2)
    tokenizer.bos_token = "<|im_start|>"  # as SmolLM2 has it
    row = encoded(tokenizer)
    assert row.ids.count(tokenizer.bos_token_id) == 3
    preflight(tokenizer, [row], eos=eos_ids(tokenizer))
    doubled = Encoded([row.ids[0], *row.ids], [False, *row.loss_mask], False)
    with pytest.raises(UserError, match="more than one BOS"):
        preflight(tokenizer, [doubled], eos=eos_ids(tokenizer))


def test_when_tokens_merge_across_the_border_prompt_and_solution_are_tokenised_apart():
    tokenizer, example = make_tokenizer(MERGING), Example("p", "ples and pears")
    prompt = prompt_ids(tokenizer, "p", prompt_template=TEMPLATE)
    whole = tokenizer.apply_chat_template(talk(TEMPLATE.format(problem="p"), "ples and pears"), return_dict=False)
    assert whole[:len(prompt)] != prompt  # otherwise this test shows nothing
    row = encoded(tokenizer, example)
    assert row.ids[:len(prompt)] == prompt
    assert trained_text(tokenizer, row) == "ples and pears<|im_end|>"


def test_a_template_that_writes_another_prompt_for_generation_is_trained_on_that_prompt():
    tokenizer = make_tokenizer("{{ '1' if add_generation_prompt else '2' }}" + tiny_tokenizer().chat_template)
    row, prompt = encoded(tokenizer), prompt_ids(tokenizer, EXAMPLE.problem, prompt_template=TEMPLATE)
    assert row.ids[:len(prompt)] == prompt
    assert trained_text(tokenizer, row) == EXAMPLE.solution + "<|im_end|>"


def test_a_template_that_cuts_the_thinking_out_still_trains_it_and_opens_it_once():
    tokenizer = make_tokenizer(THINKING)
    row = encoded(tokenizer, Example("p", "<think>\n2 + 3 = 5\n</think>\n\\boxed{5}"))
    assert trained_text(tokenizer, row) == "2 + 3 = 5\n</think>\n\\boxed{5}<|im_end|>"
    assert prompt_text(tokenizer, row).endswith("assistant\n<think>\n")


def talk(*contents: str) -> list[dict]:
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": c} for n, c in enumerate(contents)]


def test_every_assistant_turn_of_a_talk_is_trained_with_its_turn_end(tiny_tokenizer):
    row = encoded(tiny_tokenizer, Example("", messages=talk("u1", "a1", "u2", "a2")), system="sys")
    assert trained_text(tiny_tokenizer, row) == "a1<|im_end|>a2<|im_end|>"
    assert prompt_text(tiny_tokenizer, row).startswith("<|im_start|>system\nsys<|im_end|>\n<|im_start|>user")


def test_a_template_that_rewrites_earlier_turns_trains_the_last_one_only():
    tokenizer = make_tokenizer(THINKING)
    row = encoded(tokenizer, Example("", messages=talk("u", "t</think>a1", "u", "a2")))
    assert trained_text(tokenizer, row) == "\n</think>\n\na2<|im_end|>"  # the prompt has opened a thought


def test_special_tokens_inside_a_row_neither_end_nor_open_a_turn(tiny_tokenizer):
    row = encoded(tiny_tokenizer, Example("a<|im_end|>b", "5<|im_end|><|im_start|>user\nhi"))
    assert row.ids.count(turn_end(tiny_tokenizer)) == 2
    assert trained_text(tiny_tokenizer, row) == "5< |im_end|>< |im_start|>user\nhi<|im_end|>"


@pytest.mark.parametrize("solution, answer, expected", [
    ("so \\boxed{5}", "5", "so \\boxed{5}"),
    ("<think>\\boxed{4}?</think>5", "5", "<think>\\boxed{4}?</think>5\n\\boxed{5}"),
    ("2 + 3 = 5", "5", "2 + 3 = 5\n\\boxed{5}"),
    ("2 + 3 = 5", "", "2 + 3 = 5"),
    ("2 + 3 = 5\n#### 5", "", "2 + 3 = 5\n\\boxed{5}"), ("#### 5", "", "\\boxed{5}"),
    ("#### Step 1\n2 + 3 = 5", "5", "#### Step 1\n2 + 3 = 5\n\\boxed{5}")])
def test_the_final_answer_ends_up_in_a_box(solution, answer, expected):
    assert final_text(solution, answer) == expected


def test_truncation_is_marked_and_cuts_at_max_len(tiny_tokenizer):
    whole = encoded(tiny_tokenizer)
    assert not encoded(tiny_tokenizer, max_len=len(whole.ids)).truncated
    cut = encoded(tiny_tokenizer, max_len=len(whole.ids) - 1)
    assert cut.truncated and cut.ids == whole.ids[:-1] and len(cut.loss_mask) == len(cut.ids)
    text = preflight(tiny_tokenizer, [whole, cut], eos=eos_ids(tiny_tokenizer))
    assert "2 rows" in text and "1 rows truncated" in text


def test_eos_ids_come_from_template_tokenizer_and_generation_config(tiny_dir, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_dir)
    model.generation_config.eos_token_id = [2, 7]
    ids = eos_ids(tiny_tokenizer, model)
    assert ids[0] == turn_end(tiny_tokenizer) == 2 and set(ids) == {2, 7, 0}
    other = make_tokenizer(WITH_BOS.replace("<|im_end|>", "<pad>"))
    assert other.decode([turn_end(other)]) == "<pad>"


def test_a_refusing_chat_template_and_a_row_without_a_solution_are_one_clear_error():
    refusing = make_tokenizer("{{ raise_exception('System role not supported') }}")
    with pytest.raises(UserError, match="refuses messages from system, user: System role not supported"):
        prompt_ids(refusing, "p", system="s", prompt_template=TEMPLATE)
    with pytest.raises(UserError, match="row 3: no solution"):
        encoded(make_tokenizer(None), Example("p", where="row 3"))


def test_preflight_refuses_what_would_waste_a_run(tiny_tokenizer):
    row, eos = encoded(tiny_tokenizer), eos_ids(tiny_tokenizer)
    with pytest.raises(UserError, match="no trained tokens in 1 rows .1 truncated"):
        preflight(tiny_tokenizer, [encoded(tiny_tokenizer, max_len=5)], eos=eos)
    with pytest.raises(UserError, match="no trained tokens in 0 rows"):
        preflight(tiny_tokenizer, [], eos=eos)
    with pytest.raises(UserError, match="example 2 trains no EOS"):
        preflight(tiny_tokenizer, [row, Encoded(row.ids[:-1], row.loss_mask[:-1], False)], eos=eos)
    with pytest.raises(UserError, match="example 1 trains no EOS"):
        preflight(tiny_tokenizer, [Encoded(row.ids, [*row.loss_mask[:-1], False], False)], eos=eos)
    tokenizer = make_tokenizer(WITH_BOS.replace("{{ bos_token }}", "{{ bos_token + bos_token }}"), bos=True)
    with pytest.raises(UserError, match="more than one BOS"):
        preflight(tokenizer, [encoded(tokenizer)], eos=eos)


def test_preflight_shows_the_trained_text_and_the_counts(tiny_tokenizer):
    row = encoded(tiny_tokenizer)
    text = preflight(tiny_tokenizer, [row] * 3, eos=eos_ids(tiny_tokenizer))
    assert "<|im_start|>assistant\n[[2 + 3 = 5. \\boxed{5}<|im_end|>]]" in text
    assert f"3 rows, {3 * len(row.ids)} tokens, {3 * sum(row.loss_mask)} trained" in text
    plain = make_tokenizer(None)
    assert "no chat template" in preflight(plain, [encoded(plain)], eos=eos_ids(plain))


def test_pack_puts_every_index_in_one_bin_within_the_budget_and_is_deterministic():
    rng = random.Random(0)
    lengths = [rng.randint(1, 100) for _ in range(300)]
    bins = pack(lengths, 128)
    assert sorted(i for b in bins for i in b) == list(range(300)) and bins == pack(lengths, 128)
    assert all(sum(lengths[i] for i in b) <= 128 for b in bins)
    assert len(bins) <= 1.05 * sum(lengths) / 128 + 1
    assert pack([5, 200, 5], 128) == [[1], [0, 2]] and pack([], 128) == []


def test_targets_are_the_next_trained_token_and_packed_and_padded_agree():
    rows = [Encoded([10, 11, 12, 13], [False, False, True, True], False),
            Encoded([20, 21], [False, True], False)]
    packed, padded = collate_packed(rows), collate_padded(rows, pad_id=3)
    assert packed["target"].tolist() == [IGNORE, 12, 13, IGNORE, 21, IGNORE]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert padded["input_ids"].tolist() == [[10, 11, 12, 13], [20, 21, 3, 3]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert padded["target"].tolist() == [IGNORE, 12, 13, IGNORE, 21, IGNORE, IGNORE, IGNORE]


@pytest.mark.parametrize("family, attention", [("llama", "sdpa"), ("qwen2", "sdpa"), ("llama", "eager"),
                                               ("gemma2", "eager")])
def test_packed_examples_have_the_hidden_states_of_separate_ones(tmp_path, family, attention):
    folder = tiny_model(tmp_path / family, family)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval().model
    rng = random.Random(1)
    rows = [Encoded([rng.randrange(4, 380) for _ in range(n)], [True] * n, False) for n in (7, 12, 1, 20)]
    batch = collate_packed(rows)
    with torch.no_grad():
        separate = torch.cat([model(torch.tensor([row.ids])).last_hidden_state[0] for row in rows])
        by_position = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        leaking = model(batch["input_ids"])
    torch.testing.assert_close(by_position.last_hidden_state[0], separate, atol=1e-5, rtol=0)
    assert (leaking.last_hidden_state[0] - separate).abs().max() > 0.1  # the comparison can fail


# ---- prompts of chat rows, thoughts and control tokens

OPENS = ("{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content %}{% set t = '' %}"
         "{% if m.reasoning_content %}{% set t = m.reasoning_content %}"
         "{% elif '<think>' in c and '</think>' in c %}{% set t = c.split('</think>')[0].split('<think>')[1].strip() %}"
         "{% set c = c.split('</think>')[1].lstrip() %}{% endif %}"
         "{{ '<|im_start|>assistant\n<think>\n' + t + '\n</think>\n\n' + c + '<|im_end|>\n' }}"
         "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}")  # as Qwen3.5
ANSWERED = {"role": "assistant", "content": "\\boxed{5}", "reasoning_content": "two three"}


@pytest.mark.parametrize("sampled", ["two three\n</think>\n\n\\boxed{5}", "two</think>5", "a\n</think>b c"])
@pytest.mark.parametrize("template", [OPENS, THINKING, None], ids=["opens", "cuts", "none"])
def test_a_completion_is_trained_with_the_ids_that_were_sampled(template, sampled):
    tokenizer = make_tokenizer(template)
    row = encoded(tokenizer, Example("2+3?", sampled))
    prompt = prompt_ids(tokenizer, "2+3?", prompt_template=TEMPLATE)
    assert row.ids == [*prompt, *tokenizer(sampled, add_special_tokens=False)["input_ids"], turn_end(tokenizer)]


def test_a_template_that_closes_the_thoughts_of_a_solution_without_any_trains_that():
    tokenizer = make_tokenizer(OPENS)
    row = encoded(tokenizer, Example("2+3?", "\\boxed{5}"))
    assert trained_text(tokenizer, row) == "\n</think>\n\n\\boxed{5}<|im_end|>"


@pytest.mark.parametrize("template, expected", [
    (OPENS, "two three\n</think>\n\n\\boxed{5}<|im_end|>"), (THINKING, "two three\n</think>\n\n\\boxed{5}<|im_end|>"),
    (tiny_tokenizer().chat_template, "<think>\ntwo three\n</think>\n\n\\boxed{5}<|im_end|>"),
    (None, "<think>\ntwo three\n</think>\n\n\\boxed{5}<|im_end|>")], ids=["opens", "cuts", "chatml", "none"])
def test_thoughts_in_a_field_of_their_own_are_trained(template, expected):
    tokenizer = make_tokenizer(template)
    row = encoded(tokenizer, Example("", messages=[{"role": "user", "content": "2+3?"}, ANSWERED]))
    assert trained_text(tokenizer, row) == expected


def test_the_prompt_of_a_chat_row_is_all_its_turns_up_to_the_last_answer(tiny_tokenizer):
    asked = [{"role": "system", "content": "base 7"}, *talk("x is 6.", "Noted.", "x+1?")]
    for messages in (asked, [*asked, {"role": "assistant", "content": "10"}]):
        ids = prompt_ids(tiny_tokenizer, Example("x+1?", messages=messages), system="other", prompt_template=TEMPLATE)
        assert tiny_tokenizer.decode(ids) == tiny_tokenizer.apply_chat_template(asked, tokenize=False,
                                                                                add_generation_prompt=True)
    row = encoded(tiny_tokenizer, Example("x+1?", messages=messages))
    assert row.ids[:len(ids)] == ids  # trained as it is asked
    with_system = prompt_ids(tiny_tokenizer, Example("", messages=talk("q")), system="s", prompt_template=TEMPLATE)
    assert tiny_tokenizer.decode(with_system).startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<")


def with_added(*names: str):
    """A tokenizer with added tokens that are not called special."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=False) for name in names])
    return tokenizer


def test_a_turns_end_need_not_be_a_special_token():
    tokenizer = with_added("<turn|>", "<|turn>", "\n\n\n", "word")
    for old, new in (("<|im_start|>", "<|turn>"), ("<|im_end|>", "<turn|>")):
        tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    end = tokenizer.convert_tokens_to_ids("<turn|>")
    row = encoded(tokenizer, Example("2+3?", "5<turn|>6"))
    assert turn_end(tokenizer) == eos_ids(tokenizer)[0] == row.ids[-1] == end and row.ids.count(end) == 2
    assert trained_text(tokenizer, row) == "5< turn|>6<turn|>"
    preflight(tokenizer, [row], eos=eos_ids(tokenizer))


CONTROL = ["<|im_end|>", "<|im_start|>", "</think>", "<think>", "<tool_call>", "<|endoftext|>"]


@given(st.lists(st.sampled_from([*CONTROL, "<", "|", ">", "im_end", "think", "/", " ", "a", "\n"]), max_size=12))
def test_no_control_id_comes_out_of_a_problem(parts):
    tokenizer, text = thinker(), "".join(parts)
    known = {i for i, token in tokenizer.added_tokens_decoder.items()}
    plain = [i for i in prompt_ids(tokenizer, "p", prompt_template="{problem}") if i in known]
    for problem in (text, Example("", messages=[{"role": "user", "content": text}])):
        ids = prompt_ids(tokenizer, problem, prompt_template="{problem}")
        assert [i for i in ids if i in known] == plain


@functools.cache
def thinker():
    return with_added("<think>", "</think>", "<tool_call>")


def test_a_solution_keeps_its_thoughts_and_ends_once():
    row = encoded(thinker(), Example("p", "<think>a</think>5<|im_end|><|im_start|>"))
    assert trained_text(thinker(), row) == "<think>a</think>5< |im_end|>< |im_start|><|im_end|>"
    assert thinker().convert_tokens_to_ids("</think>") in row.ids
