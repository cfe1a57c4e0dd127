"""Run a model's chat template: its thinking switch, its date, and the thoughts in what it writes.

Templates differ in where <think> comes from: the model writes it (Qwen3, SmolLM3), the prompt ends in it (R1-Distill,
Qwen3.5), or with thinking off the prompt holds an empty block."""
import datetime
import functools
import json
import random
import re

from minimath.core.errors import UserError
from minimath.core.run_folder import say_once
from minimath.core.text import named_values

OPEN, CLOSE = "<think>", "</think>"
QUESTION = [{"role": "user", "content": "a"}]  # to see what a template makes of one
SWITCHES = ("enable_thinking", "thinking")  # Qwen3, SmolLM3, GLM; Granite, DeepSeek-V3.1
DAY = datetime.date(2026, 1, 1)  # of every template that asks for today's: a run, its resume, its evaluation and its
DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # export put the same prompts


def template_of(tokenizer) -> str:
    """Return the chat template, of several the default; "" when there is none."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return str(template.get("default", template) if isinstance(template, dict) else template)


def per_template(function):
    """Cache what a function finds in a tokenizer and its chat template, which users may replace."""
    cached = functools.lru_cache(maxsize=8)(lambda template, *args: function(*args))
    return functools.wraps(function)(lambda tokenizer, *args: cached(template_of(tokenizer), tokenizer, *args))


@per_template
def chat_args(tokenizer, thinking: str = "auto", template_args: str = "") -> dict:
    """Return what the template gets besides messages. UserError: it reads no such thing."""
    given, template = named_values(template_args), template_of(tokenizer)
    for name in given:
        if ("strftime_now" if name == "date" else name) not in template:
            raise UserError(f"template_args={template_args}: the model's chat template reads no {name}")
    if thinking == "auto":
        return given
    off, on = (dict.fromkeys(SWITCHES, switch) | given for switch in (False, True))
    silent, thinks = (render(tokenizer, QUESTION, args, generate=True) for args in (off, on))
    does_so = is_open(thinks) if thinking == "on" else OPEN not in template  # without being told
    if silent == thinks and not does_so:
        raise UserError(f"thinking={thinking}, but the model's chat template has no switch for it: leave thinking=auto "
                        "or set a switch of another name by template_args=NAME=VALUE")
    return on if thinking == "on" else off


@per_template
def opens_thought(tokenizer, thinking: str = "auto", template_args: str = "") -> bool:
    """Tell whether completions of the prompts that the template writes begin inside a thought."""
    prompt = render(tokenizer, QUESTION, chat_args(tokenizer, thinking, template_args), generate=True)
    return OPEN in template_of(tokenizer) and is_open(prompt)


@per_template
def drops_system(tokenizer) -> bool:
    """Tell whether the template leaves out what a system message says."""
    return "MARK" not in render(tokenizer, [{"role": "system", "content": "MARK"}, *QUESTION], generate=True)


def render(tokenizer, messages: list[dict], args: dict | None = None, *, generate: bool = False) -> str:
    """Write messages as text, always the same. UserError: the template refuses them."""
    if not template_of(tokenizer):
        return "\n\n".join(m["content"] for m in messages) + ("\n\n" if generate else "")
    template, args, state = template_of(tokenizer), dict(args or {}), random.getstate()
    day = args.pop("date", DAY)
    if "strftime_now" in template:
        say_once(f"the model's chat template writes the date: here it is always {day}; template_args=date=YYYY-MM-DD "
                 "sets another")
        args["chat_template"] = dated(template, day)
    try:
        random.seed(0)  # of jinja's filter `random`
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **args)
    except Exception as error:  # a template is a program of the model's
        roles = ", ".join(m["role"] for m in messages)
        raise UserError(f"the model's chat template refuses messages from {roles}: {error}; "
                        "try without a system message (system=)") from error
    finally:
        random.setstate(state)


def template_as_asked(tokenizer, thinking: str, template_args: str) -> str | None:
    """Return the template with date and switches of a run as its own defaults, for who asks without minimath."""
    args, template = dict(chat_args(tokenizer, thinking, template_args)), tokenizer.chat_template
    if not isinstance(template, str):
        return template
    template = dated(template, args.pop("date", DAY))
    return "".join(f"{{%- if {name} is not defined -%}}{{%- set {name} = {json.dumps(value)} -%}}{{%- endif -%}}"
                   for name, value in args.items() if name in template) + template


def dated(template: str, day: datetime.date) -> str:
    """Write a day in the place of today's date."""
    return DATE.sub(lambda found: repr(day.strftime(found[2])), template)


# ---- thoughts

def is_open(prompt: str) -> bool:
    """Tell whether an answer to a prompt begins inside a thought."""
    return prompt.rstrip().endswith(OPEN)


def split_thought(text: str) -> tuple[str, str]:
    """Split a text into thought and answer, both stripped; no thought is ""."""
    before, end, after = text.partition(CLOSE)
    return (before.rpartition(OPEN)[2].strip(), after.strip()) if end else ("", text.strip())


def behind_thought(text: str, begun: bool = False) -> str:
    """Return what stands behind the thought of a completion: "" while it goes on, all where there is none.

    begun: the completion begins inside a thought. It ends once: what follows its end is no thought, tags or not."""
    _, end, answer = text.partition(CLOSE)
    return answer if end else "" if begun or text.lstrip().startswith(OPEN) else text


def begins_in_thought(tokenizer, prompt: list[int]) -> bool:
    """Tell whether a completion of a prompt begins inside a thought."""
    return is_open(tokenizer.decode(prompt[-16:]))  # enough for a tag of several tokens


def thought_of(message: dict) -> tuple[str, str]:
    """Return thought and answer of an assistant's message, both stripped."""
    if "reasoning_content" in message:
        return message["reasoning_content"].strip(), message["content"].strip()
    return split_thought(message["content"])


def ways_to_write(message: dict) -> list[dict]:
    """Give a message as it is, then with its thought in the text, or in a field of its own."""
    role, text, ways = message["role"], message["content"], [message]
    if "reasoning_content" in message:
        ways.append({"role": role, "content": with_thought(message["reasoning_content"], text)})
    elif text.lstrip().startswith(OPEN) and CLOSE in text:
        thought, answer = split_thought(text)
        ways.append({"role": role, "reasoning_content": thought, "content": answer})
    return ways


def with_thought(thought: str, answer: str) -> str:
    return f"{OPEN}\n{thought}\n{CLOSE}\n\n{answer}"
