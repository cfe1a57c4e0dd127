"""Solve problems and check their arithmetic: minimath solve ["PROBLEM"] model=... adapter=runs/...

The solution appears as it is written; behind each line stands whether its arithmetic holds. Without a problem it asks
for one after the other, until an empty line.
"""
import sys
import time

from minimath.grading.answer import extract_answer
from minimath.data.chat import prompt_ids
from minimath.config.load import fields_of
from minimath.config.schema import EvalConfig
from minimath.core.errors import UserError
from minimath.rollout.open import open_engine
from minimath.models.load import describe, load_model
from minimath.core.run import keep_freed_memory
from minimath.grading.steps import check_steps


def solve(problem: str, cfg: EvalConfig) -> None:
    """Print a solution (greedy unless temperature is set), the checked steps of each line, and the answer.

    samples > 1 prints several. problem "": read problems from standard input, one a line, until an empty one. Raises
    UserError when there is none, or for an unusable model.
    """
    problems = [problem] if problem else ask() if sys.stdin.isatty() else list(ask())
    if not problems:  # found out before the model loads
        raise UserError('minimath solve needs a problem: minimath solve "Tom has 3 apples ..." adapter=runs/... '
                        "(in a terminal it asks for one)")
    keep_freed_memory()
    model, tokenizer = load_model(cfg, train=False)
    print(describe(model, cfg) + (f", adapter {cfg.adapter.path}" if cfg.adapter.path else ""), flush=True)
    with open_engine(cfg, model, tokenizer) as sample:
        for one in problems:
            solve_one(one, cfg, tokenizer, sample)


def parse(words: list[str]) -> tuple[str, list[str]]:
    """(problem, options) of the command line; the problem may be left out. UserError for an empty one."""
    # an option in its place is an option; "x=3, y=x+1. What is y?" is a problem
    if not words or words[0].lstrip("-").partition("=")[0].replace("-", "_") in fields_of(EvalConfig):
        return "", words
    if not words[0].strip():
        raise UserError('the problem is empty: minimath solve "Tom has 3 apples ..." adapter=runs/...')
    return words[0], words[1:]


def ask():
    """Yield problems from standard input until an empty line or its end."""
    prompt = "\nproblem (empty line ends): " if sys.stdin.isatty() else ""
    while True:
        print(prompt, end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def solve_one(problem: str, cfg: EvalConfig, tokenizer, sample) -> None:
    prompt = prompt_ids(tokenizer, problem, system=cfg.prompt.system, prompt_template=cfg.prompt.prompt_template)
    if len(prompt) > cfg.prompt.max_prompt_len:
        raise UserError(f"the problem has {len(prompt)} tokens, max_prompt_len={cfg.prompt.max_prompt_len}: raise that")
    shown, started = Shown(), time.perf_counter()
    live = cfg.samples == 1
    print()
    [completions] = sample([prompt], samples=cfg.samples, on_tokens=(
        lambda _, __, ids: shown.add(tokenizer.decode(ids, skip_special_tokens=True))) if live else None)
    seconds = time.perf_counter() - started
    for completion in completions:
        text = tokenizer.decode(completion.ids, skip_special_tokens=True)
        shown.end(text)
        ended = "" if completion.ended else f", cut at max_new_tokens={cfg.sampling.max_new_tokens}"
        speed = f", {len(completion.ids) / max(seconds, 1e-9):.0f} tokens/s" if live else ""
        size = f"{len(completion.ids)} tokens{ended}{speed}"
        print(f"answer: {printable(str(extract_answer(text)))} ({size})", flush=True)
        shown = Shown()


class Shown:
    """A solution on the terminal, as far as it is written: each line gets its mark when it is complete."""

    def __init__(self):
        self.count = 0  # characters shown

    def add(self, text: str) -> None:
        """Show what is new in `text`; a character that may still change (half of one in UTF-8) waits."""
        text = text.rstrip("\ufffd")
        while (end := text.find("\n", self.count)) >= 0:
            line_start = text.rfind("\n", 0, end) + 1
            print(printable(text[self.count:end]) + mark(text[line_start:end]))
            self.count = end + 1
        print(printable(text[self.count:]), end="", flush=True)
        self.count = max(self.count, len(text))

    def end(self, text: str) -> None:
        """The rest of the whole text, and the mark of its last line."""
        self.add(text)
        print(printable(text[self.count:]) + mark(text[text.rfind("\n") + 1:]))


def mark(line: str) -> str:
    steps = check_steps(line)
    return "" if not steps.total else "  [right]" if steps.right == steps.total else "  [WRONG]"


def printable(text: str) -> str:
    """Text without control characters: what a model writes must not drive the terminal."""
    return "".join(c if c.isprintable() or c == "\t" else "?" for c in text)


if __name__ == "__main__":
    from minimath.cli import dispatch, run_command
    sys.exit(run_command(lambda: dispatch("solve", sys.argv[1:])))
