"""Write the Modelfile of Ollama beside an exported model."""
import json
import re

from minimath.config.schema import PromptOptions
from minimath.core.errors import UserError
from minimath.data.chat import turn_end
from minimath.data.template import chat_args, render, template_of


def modelfile(tokenizer, gguf_name: str, prompt: PromptOptions) -> str:
    """Write a Modelfile that asks as in training. UserError: it can't hold a text.

    Greedy, and without Ollama's penalty on repeated tokens: in a sum numbers recur."""
    user = prompt.prompt_template.format(problem="\0").replace("{{", '{{ "{{" }}')  # {{ would begin an action of Go's
    system, template, chatml = prompt.system, "", chatml_parts(tokenizer, prompt)
    if chatml is not None:
        note, system = "ChatML, each problem in the words of the run's prompt_template", system or chatml[0]
        begun = chatml[1] and f"{{{{ if eq (len (slice $.Messages $i)) 1 }}}}{chatml[1]}{{{{ end }}}}"
        every = "{{ range $i, $_ := .Messages }}" if begun else "{{ range .Messages }}"
        template = ("{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}" + every +
                    '{{ if eq .Role "user" }}<|im_start|>user\n' + user.replace("\0", "{{ .Content }}") +
                    f"<|im_end|>\n<|im_start|>assistant\n{begun}"
                    '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n{{ end }}{{ end }}')
    elif not template_of(tokenizer):
        note = "the model has no chat template: plain text, as it was trained"
        template = "{{ if .System }}{{ .System }}\n\n{{ end }}" + user.replace("\0", "{{ .Prompt }}") + "\n\n"
    else:
        note = ("the chat template is the GGUF file's own: where Ollama does not know it, write TEMPLATE here. "
                f"Put each problem into the words of the training: {json.dumps(prompt.prompt_template)}")
    end = tokenizer.convert_ids_to_tokens(turn_end(tokenizer))
    lines = [f"FROM ./{gguf_name}", f"# {note}", template and f"TEMPLATE {quoted(template)}",
             system and f"SYSTEM {quoted(system)}", f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}",
             "PARAMETER temperature 0", "PARAMETER repeat_penalty 1.0"]
    return "".join(f"{line}\n" for line in lines if line)


def chatml_parts(tokenizer, prompt: PromptOptions) -> tuple[str, str] | None:
    """Find the template's own system message and what begins an answer, such as <think>; None: it isn't ChatML."""
    if not template_of(tokenizer):
        return None
    system, user = {"role": "system", "content": "S"}, {"role": "user", "content": "U"}
    args = chat_args(tokenizer, prompt.thinking, prompt.template_args)
    try:
        given, default = (render(tokenizer, messages, args, generate=True) for messages in ([system, user], [user]))
    except UserError:  # one that refuses a system message is not ChatML
        return None
    end = "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    found = re.fullmatch(r"(?:<\|im_start\|>system\n(.*)<\|im_end\|>\n)?" + re.escape(end) + "(.*)", default, re.DOTALL)
    if not found or given != f"<|im_start|>system\nS<|im_end|>\n{end}{found[2]}":
        return None
    return found[1] or "", found[2]


def quoted(text: str) -> str:
    if '"""' in text:
        raise UserError('system or prompt_template: no Modelfile holds three quotation marks ("""); use to=safetensors')
    return f'"""{text}"""'
