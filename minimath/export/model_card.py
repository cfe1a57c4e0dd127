"""Write the texts beside an exported model: its card and the Modelfile of Ollama."""
import json
from pathlib import Path

from minimath.config.schema import PromptOptions
from minimath.core.errors import UserError
from minimath.data.chat import has_template, turn_end, user_text

CHATML = ("<|im_start|>system\n{system}<|im_end|>\n", "<|im_start|>user\n{user}<|im_end|>\n", "<|im_start|>assistant\n")
FIGURES = {"problems": "problems", "accuracy": "accuracy", "interval": "95% interval", "mean_tokens": "mean tokens",
           "correct_steps": "correct steps", "finished": "finished"}


# ---- model card

def card(*, name: str, base: str, adapter: dict, run: dict, evaluation: dict, drift: list[str], command: str,
         usage: str) -> str:
    """Write README.md.

    adapter: peft's options; run: minimath's; evaluation: the summary of one; drift: what was said of it.

    No licence is stated, and no path of this machine: of a folder or a file only the name is told.
    """
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation",
             *([f"base_model: {base}"] if base.count("/") == 1 and not Path(base).exists() else []),
             "tags:", "- minimath", "- math", "---", "", f"# {name}", "",
             f"{shown(base)} with a LoRA adapter merged into its weights, made with minimath.", "",
             f"- base model: {shown(base)}",
             "- adapter: " + ", ".join(f"{key} {adapter[key]}" for key in ("r", "lora_alpha", "use_rslora", "use_dora")
                                       if key in adapter) + f", on {targets(adapter)}"]
    lines += [f"- {key}: {shown(str(run[key]))}" for key in ("data", "quant", "steps", "lr") if run.get(key)]
    lines += [f"- {line}" for line in drift]
    lines += [f"- made by: `{command}`", "",
              "Licence: not stated here. Those of the base model and of the training data apply; add yours before you "
              "share it."]
    if run.get("system") or run.get("prompt_template"):
        lines += ["", "## Prompt", "", "System message and user message of the training, in the chat template:", "",
                  fenced(run.get("system") or "(none)"), "", fenced(run.get("prompt_template") or "{problem}")]
    if evaluation:
        lines += ["", "## Evaluation", "", "Of the adapter on its base, before the merge:", "",
                  *(f"- {words}: {figure(evaluation[key])}" for key, words in FIGURES.items() if key in evaluation)]
    return "\n".join([*lines, "", "## Use", "", fenced(usage), ""])


def targets(adapter: dict) -> str:
    names = adapter.get("target_modules") or "its layers"
    return names if isinstance(names, str) else ", ".join(sorted(names))


def shown(text: str) -> str:
    """A path without its folders; anything else as it is."""
    return Path(text).name if text.startswith(("/", ".", "~")) or Path(text).exists() else text


def figure(value) -> str:
    return " to ".join(figure(v) for v in value) if isinstance(value, (list, tuple)) else \
        f"{value:.4g}" if isinstance(value, float) else str(value)


def fenced(text: str) -> str:
    fence = "```" if "```" not in text else "~~~~"
    return f"{fence}\n{text}\n{fence}"


# ---- Ollama

def modelfile(tokenizer, gguf_name: str, prompt: PromptOptions) -> str:
    """Write a Modelfile whose prompts are those of the training.

    A chat template other than ChatML stays in the GGUF file, where Ollama looks for one that it knows. Greedy, and
    without Ollama's penalty on repeated tokens: in a sum numbers recur. Raises UserError for a text that a Modelfile
    can't hold.
    """
    system, prompt_template = prompt.system, prompt.prompt_template
    lines = [f"FROM ./{gguf_name}"]
    user = go_text(user_text("\0", prompt_template)).replace("\0", "{{ .Content }}")
    default = chatml_system(tokenizer)
    if default is not None:
        lines += ["# " + ("ChatML" if prompt_template == "{problem}" else
                          "ChatML; each problem is put into the words of the run's prompt_template"),
                  f"TEMPLATE {quoted(chatml_template(user))}"]
        system = system or default
    elif not has_template(tokenizer):
        lines += ["# the model has no chat template: plain text, as it was trained",
                  f"TEMPLATE {quoted('{{ if .System }}{{ .System }}' + 2 * chr(10) + '{{ end }}' + plain(user))}"]
    else:
        lines += ["# the chat template is the GGUF file's own: where Ollama does not know it, write TEMPLATE here"]
        if prompt_template != "{problem}":
            lines += ["# in training each problem stood in these words: " + json.dumps(prompt_template)]
    if system:
        lines.append(f"SYSTEM {quoted(system)}")
    end = tokenizer.convert_ids_to_tokens(turn_end(tokenizer))
    return "\n".join([*lines, f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}", "PARAMETER temperature 0",
                      "PARAMETER repeat_penalty 1.0", ""])


def chatml_system(tokenizer) -> str | None:
    """Find the template's own system message; None when it isn't ChatML."""
    if not has_template(tokenizer):
        return None
    ask = [{"role": "user", "content": "U"}]
    try:
        texts = [tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                 for messages in ([{"role": "system", "content": "S"}, *ask], ask)]
    except Exception:  # a template is a program of the model's: one that refuses a system message is not ChatML
        return None
    first, user, answer = CHATML
    end = user.format(user="U") + answer
    if texts[0] != first.format(system="S") + end or not texts[1].endswith(end):
        return None
    before, (opens, closes) = texts[1].removesuffix(end), first.split("{system}")
    if before and not (before.startswith(opens) and before.endswith(closes)):
        return None
    return before.removeprefix(opens).removesuffix(closes) if before else ""


def chatml_template(user: str) -> str:
    """Write ChatML in Go; user: the user message, {{ .Content }} for the problem."""
    first, asked, answer = CHATML
    return ("{{ if .System }}" + first.replace("{system}", "{{ .System }}") + "{{ end }}{{ range .Messages }}"
            '{{ if eq .Role "user" }}' + asked.replace("{user}", user) + answer +
            '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n{{ end }}{{ end }}')


def plain(user: str) -> str:
    return user.replace("{{ .Content }}", "{{ .Prompt }}") + "\n\n"


def go_text(text: str) -> str:
    """Text as it stands in a Go template: {{ would begin an action."""
    return text.replace("{{", '{{ "{{" }}')


def quoted(text: str) -> str:
    if '"""' in text:
        raise UserError('a Modelfile can\'t hold three quotation marks in a row ("""), as in the run\'s system or '
                        "prompt_template; use to=safetensors")
    return f'"""{text}"""'
