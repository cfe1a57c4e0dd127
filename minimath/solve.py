"""Solve one problem and check its arithmetic: minimath solve "PROBLEM" model=... adapter=runs/..."""
import sys

from minimath.answer import extract_answer
from minimath.chat import prompt_ids
from minimath.config import EvalConfig, UserError, fields_of
from minimath.engines import open_engine
from minimath.model import describe, load_model
from minimath.runs import keep_freed_memory
from minimath.steps import check_steps


def solve(problem: str, cfg: EvalConfig) -> None:
    """Print a solution (greedy unless temperature is set), the checked steps of each line, and the answer.

    samples > 1 prints several. Raises UserError for an empty problem or an unusable model.
    """
    # an option in its place is a slip; "x=3, y=x+1. What is y?" is a problem
    if not problem.strip() or problem.partition("=")[0] in fields_of(EvalConfig):
        raise UserError('minimath solve needs the problem first: minimath solve "Tom has 3 apples ..." adapter=runs/...')
    keep_freed_memory()
    model, tokenizer = load_model(cfg, train=False)
    print(describe(model, cfg) + (f", adapter {cfg.adapter}" if cfg.adapter else ""))
    prompt = prompt_ids(tokenizer, problem, system=cfg.system, prompt_template=cfg.prompt_template)
    with open_engine(cfg, model, tokenizer) as sample:
        [completions] = sample([prompt], samples=cfg.samples)
    for completion in completions:
        text = tokenizer.decode(completion.ids, skip_special_tokens=True)
        print()
        for line in text.splitlines():
            steps = check_steps(line)
            mark = "" if not steps.total else "  [right]" if steps.right == steps.total else "  [WRONG]"
            print(printable(line) + mark)
        ended = "" if completion.ended else f", cut at max_new_tokens={cfg.max_new_tokens}"
        print(f"answer: {printable(str(extract_answer(text)))} ({len(completion.ids)} tokens{ended})")


def printable(text: str) -> str:
    """Text without control characters: what a model writes must not drive the terminal."""
    return "".join(c if c.isprintable() or c == "\t" else "?" for c in text)


if __name__ == "__main__":
    from minimath.__main__ import dispatch, run_command
    sys.exit(run_command(lambda: dispatch("solve", sys.argv[1:])))
