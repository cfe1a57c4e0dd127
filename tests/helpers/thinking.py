"""Chat templates that deal with thoughts as those of known models do, and a tokenizer that has the tags."""
from tiny import tiny_tokenizer
from tokenizers import AddedToken

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"


def talks(answer: str, begins: str, head: str = "") -> str:
    """A template of the names, the turn of an assistant and what begins one."""
    return (f"{head}{{% for m in messages %}}{{% if m.role == 'assistant' %}}{answer}{{% else %}}{TURN}{{% endif %}}"
            f"{{% endfor %}}{ASK}{begins}{{% endif %}}")


SPLIT = ("{% set c = m.content %}{% set t = m.reasoning_content or '' %}{% if '</think>' in c and not t %}"
         "{% set t = c.split('</think>')[0].split('<think>')[-1].strip() %}"
         "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}")
LAST = ("{% if loop.last %}{{ '<|im_start|>assistant\n<think>\n' + t + '\n</think>\n\n' + c + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>assistant\n' + c + '<|im_end|>\n' }}{% endif %}")
EMPTY = "{{ '<think>\n\n</think>\n\n' }}"
OFF = "{% if enable_thinking is defined and not enable_thinking %}" + EMPTY
QWEN3 = talks(SPLIT + LAST, OFF + "{% endif %}")
QWEN35 = talks(SPLIT + LAST, OFF + "{% else %}{{ '<think>\n' }}{% endif %}")
QWEN35_SMALL = talks(SPLIT + LAST, "{% if enable_thinking %}{{ '<think>\n' }}{% else %}" + EMPTY + "{% endif %}")
R1 = talks("{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}", "{{ '<think>\n' }}")
SMOLLM3 = talks("{{ '<|im_start|>assistant\n' }}{{ '' if on else '<think>\n\n</think>\n' }}{{ m.content }}"
                "{{ '<|im_end|>\n' }}",
                "{{ '' if on else '<think>\n\n</think>\n' }}",
                "{% set on = enable_thinking is not defined or enable_thinking %}{{ '<|im_start|>system\nToday: ' + "
                "strftime_now('%d %B %Y') + (' /think' if on else ' /no_think') + '<|im_end|>\n' }}")
GRANITE = talks(TURN, "", "{{ 'Write <think></think> first. ' if thinking }}{{ strftime_now(\"%Y\") }}")
LFM2 = talks("{{ '<|im_start|>assistant\n' }}{{ '<think>' + m.thinking + '</think>' if m.thinking and loop.last }}"
             "{{ m.content + '<|im_end|>\n' }}", "")
CHATML = talks(TURN, "")
ALL = {"Qwen3": QWEN3, "Qwen3.5-4B": QWEN35, "Qwen3.5-0.8B": QWEN35_SMALL, "R1-Distill": R1, "SmolLM3": SMOLLM3,
       "Granite-3.3": GRANITE, "LFM2.5": LFM2, "Phi-4-mini, Gemma-3": CHATML}


def thinker(template: str, *more: str):
    """A tokenizer with both tags, as added tokens that are not special."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=False) for name in ("<think>", "</think>", *more)])
    tokenizer.chat_template = template
    return tokenizer
