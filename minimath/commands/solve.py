"""Solve problems and check their arithmetic.

    minimath solve ["PROBLEM"] model=... adapter=runs/...

The solution appears as it is written. Without a problem it asks for one after the other, until an empty line."""
import re
import sys
import time
from collections.abc import Iterator

from minimath.config.load import load_config
from minimath.config.options import options_of
from minimath.config.schema import EvalConfig
from minimath.config.trained import as_trained
from minimath.core.errors import UserError
from minimath.core.log import printable
from minimath.core.run import keep_freed_memory
from minimath.core.text import did_you_mean
from minimath.data.template import begins_in_thought, behind_thought
from minimath.eval.budget import limited_stream
from minimath.grading.answer import final_answer
from minimath.grading.steps import check_steps
from minimath.models.load import describe
from minimath.models.policy import Policy, load_policy
from minimath.rollout.open import open_engine

NOT_UTF8 = "the problem is not UTF-8 text: convert it, as by iconv, or set the terminal to UTF-8"


def solve_command(words: list[str]) -> None:
    """Run `minimath solve` with the words behind it. UserError: also for no problem."""
    problem, options = parse(words)
    cfg = load_config(EvalConfig, None, options)
    for name, option in options_of(EvalConfig).items():
        unread = option.group in ("data", "run") and name != "seed" or name in ("suite", "budgets")
        if unread and cfg.value(name) != option.default:
            raise UserError(f"minimath solve reads no data, keeps nothing: {name}= is for minimath eval, leave it out")
    problems = [problem] if problem else ask() if sys.stdin.isatty() else list(ask())
    if not problems:  # found out before the model loads
        raise UserError('minimath solve needs a problem: minimath solve "Tom has 3 apples ..." adapter=runs/... '
                        "(in a terminal it asks for one)")
    keep_freed_memory()
    cfg = as_trained(cfg)
    policy = load_policy(cfg, train=False)
    print(describe(policy.model, cfg) + (f", adapter {cfg.adapter.path}" if cfg.adapter.path else ""), flush=True)
    with open_engine(cfg.engine, cfg.sampling, policy, seed=cfg.run.seed) as engine:
        for one in problems:
            solve(one, cfg, policy, engine)


def parse(words: list[str]) -> tuple[str, list[str]]:
    """Split the command line into problem, "" if left out, and options. UserError."""
    # an option in its place is an option, a misspelt one too; "x=3, y=x+1. What is y?" is a problem
    first, known = "".join(words[:1]), options_of(EvalConfig)
    name = first.lstrip("-").partition("=")[0].rpartition(".")[2].replace("-", "_")
    if not words or name in known or re.fullmatch(r"--[a-z]\S*|[\w.-]+=\S*", first) and did_you_mean(name, known):
        return "", words
    if not words[0].strip():
        raise UserError('the problem is empty: minimath solve "Tom has 3 apples ..." adapter=runs/...')
    return in_utf8(words[0]), words[1:]


def in_utf8(problem: str) -> str:
    """Return a problem; UserError where bytes of another encoding stand in it."""
    try:
        problem.encode()
    except UnicodeEncodeError:
        raise UserError(NOT_UTF8) from None
    return problem


def ask() -> Iterator[str]:
    """Yield problems from standard input until an empty line or its end. UserError."""
    prompt = "\nproblem (empty line ends): " if sys.stdin.isatty() else ""
    try:
        while line := input(prompt).strip():
            yield in_utf8(line)
    except EOFError:
        return
    except UnicodeDecodeError:
        raise UserError(NOT_UTF8) from None


def solve(problem: str, cfg: EvalConfig, policy: Policy, engine) -> None:
    """Print the solutions of one problem, a single one as it is written. UserError."""
    prompt = policy.prompt_ids(problem)
    if len(prompt) > cfg.prompt.max_prompt_len:
        raise UserError(f"the problem has {len(prompt)} tokens, max_prompt_len={cfg.prompt.max_prompt_len}: raise that")
    thinks = begins_in_thought(policy.tokenizer, prompt)
    shown, started, samples = Shown(thinks), time.perf_counter(), {}
    live = cfg.samples == 1 and not cfg.thinking_budget  # what runs then is the rest of a completion
    print()
    for finished in limited_stream(engine, cfg.thinking_budget, [prompt], cfg.samples):
        samples |= {s: sample for _, s, sample in finished}
        for _, _, ids in engine.running() if live else ():
            shown.add(policy.decode(ids))
    seconds = time.perf_counter() - started
    for _, sample in sorted(samples.items()):
        shown.add(sample.text + "\n")
        cut = "" if sample.finished else f", cut at max_new_tokens={cfg.sampling.max_new_tokens}"
        speed = f", {sample.tokens / seconds:.0f} tokens/s" if live else ""
        answer = printable(str(None if sample.cut_thinking else final_answer(sample.text, sample.finished)))
        thought = f", {sample.thought} of thought" if sample.thought else ""
        print(f"answer: {answer} ({sample.tokens} tokens{thought}{cut}{speed})", flush=True)
        shown = Shown(thinks)


class Shown:
    """A solution on the terminal, as far as it is written. thinks: it begins inside a thought."""

    def __init__(self, thinks: bool = False):
        self.count, self.thinks = 0, thinks  # characters shown

    def add(self, text: str) -> None:
        """Show what is new in `text`, and behind each complete line that is no thought whether its arithmetic holds."""
        text = text.rstrip("\ufffd")  # half of a character in UTF-8 waits
        while (end := text.find("\n", self.count)) >= 0:
            steps = check_steps(behind_thought(text[:end], self.thinks).rpartition("\n")[2])
            mark = "" if not steps.total else "  [correct]" if steps.sound else "  [WRONG]"
            print(printable(text[self.count:end]) + mark)
            self.count = end + 1
        print(printable(text[self.count:]), end="", flush=True)
        self.count = max(self.count, len(text))
